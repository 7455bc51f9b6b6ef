// The ways an image's file comes to this page: chosen, pasted, dropped.

const byId = (id) => document.getElementById(id);

/** Call `take` with each image's File, and `notice` with words where what came is none. */
export function watchArrivals(take, notice) {
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files.length > 0) take(target.files[0]);
    target.value = ""; // the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    const written = types.includes("text/plain") && types.includes("text/html"); // by an office program, as text and its image
    if (files.length === 0 || written) return;
    event.preventDefault();
    takeFrom(event.clipboardData);
  });
  watchDrops();

  function watchDrops() {
    let inside = 0; // dragenter and dragleave come for every element that is passed
    const pass = (step) => (byId("drop").hidden = (inside += step) <= 0);
    document.addEventListener("dragenter", () => pass(1));
    document.addEventListener("dragleave", () => pass(-1));
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      pass(-inside);
      takeFrom(event.dataTransfer);
    });
  }

  function takeFrom({ files }) {
    const file = Array.from(files).find(({ type }) => type.startsWith("image/")) ?? files[0];
    if (file) take(file);
    else notice("That is no image file: save the image first, or copy and paste it.");
  }
}
