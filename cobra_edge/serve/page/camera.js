// An image from the camera: it runs while its window is open and no longer.

import { imageOf } from "./image.js";

const byId = (id) => document.getElementById(id);
const REASONS = {
  NotAllowedError: "The camera was refused. Allow it for this page in the browser's settings, or choose an image instead.",
  NotFoundError: "No camera was found. Choose an image instead.",
  NotReadableError: "The camera is in use by another program. Close that, or choose an image instead.",
};

/** Make the window work; `taken` is called with the File of an image. Returns the function that opens it. */
export function makeCamera(taken) {
  const [dialog, video, words, shutter] = ["camera", "viewfinder", "camera-words", "shutter"].map(byId);
  let stream = null;

  function stop() {
    for (const track of stream?.getTracks() ?? []) track.stop();
    stream = video.srcObject = null;
    video.hidden = shutter.disabled = true;
  }

  async function open() {
    dialog.showModal();
    words.textContent = "Waiting for the camera…";
    try {
      if (!navigator.mediaDevices) throw new Error("insecure");
      const opened = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
      if (!dialog.open || stream) return opened.getTracks().forEach((track) => track.stop()); // closed in the meantime
      stream = video.srcObject = opened;
      await video.play();
      words.textContent = "";
      video.hidden = shutter.disabled = false;
      shutter.focus();
    } catch (error) {
      if (!dialog.open) return;
      stop();
      const insecure = "Browsers give the camera only to pages from localhost or over HTTPS. Choose an image instead.";
      words.textContent = error.message === "insecure" ? insecure : (REASONS[error.name] ?? `The camera does not start (${error.name}).`);
    }
  }

  shutter.addEventListener("click", async () => {
    const file = await imageOf(video);
    dialog.close();
    taken(file);
  });
  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop); // by whichever key or button
  return open;
}
