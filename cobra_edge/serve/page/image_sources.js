// Image sources: file chooser, paste, drag and drop.

const byId = (id) => document.getElementById(id);

/** Call `take` with the File of each image, and `notice` with a message for anything else. */
export function watchImageSources(take, notice) {
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files.length > 0) take(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    const isRichText = types.includes("text/plain") && types.includes("text/html"); // office programs add an image of the text
    if (files.length === 0 || isRichText) return;
    event.preventDefault();
    takeFrom(event.clipboardData);
  });
  watchDrops();

  function watchDrops() {
    let inside = 0; // dragenter and dragleave fire for every element
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
    else notice("That is not an image file: save the image first, or copy and paste it.");
  }
}
