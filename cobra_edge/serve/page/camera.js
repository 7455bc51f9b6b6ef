// A photo from the camera, which runs only while its dialog is open.

import { imageOf } from "./image.js";

const byId = (id) => document.getElementById(id);
const REASONS = {
  NotAllowedError: "Access to the camera was denied. Allow it for this page in the browser's settings, or choose an image instead.",
  NotFoundError: "No camera was found. Choose an image instead.",
  NotReadableError: "The camera is in use by another program. Close it, or choose an image instead.",
};

/** Set up the dialog; `onPhoto` is called with a File. Returns the function that opens the dialog. */
export function makeCamera(onPhoto) {
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
      if (!dialog.open || stream) return opened.getTracks().forEach((track) => track.stop()); // closed meanwhile
      stream = video.srcObject = opened;
      await video.play();
      words.textContent = "";
      video.hidden = shutter.disabled = false;
      shutter.focus();
    } catch (error) {
      if (!dialog.open) return;
      stop();
      const insecure = "Browsers allow the camera only on localhost or over HTTPS. Choose an image instead.";
      words.textContent = error.message === "insecure" ? insecure : (REASONS[error.name] ?? `The camera does not start (${error.name}).`);
    }
  }

  shutter.addEventListener("click", async () => {
    const file = await imageOf(video);
    dialog.close();
    onPhoto(file);
  });
  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop); // by any key or button
  return open;
}
