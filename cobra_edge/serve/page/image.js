// Prepares an image file. Its bytes are sent unchanged, so that the server finds its cached state; only an image larger than
// MAX_SIDE, or of an unsupported format, is re-encoded.

const MAX_SIDE = 2048; // pixels
const THUMBNAIL = 320; // pixels
const SENT_UNCHANGED = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** Return {url, thumbnail, name, width, height, note}; both URLs are data URLs. Throws an Error with a message. */
export async function readImage(file) {
  const name = file.name || "image";
  const image = await decoded(file, name);
  const { naturalWidth, naturalHeight } = image;
  const scale = Math.min(1, MAX_SIDE / Math.max(naturalWidth, naturalHeight));
  const known = SENT_UNCHANGED.includes(file.type);
  let sent = file;
  let note = "";
  if (scale < 1 || !known) {
    sent = await reencoded(image, scale, file.type === "image/jpeg" ? "image/jpeg" : "image/png");
    note = scale < 1 ? `scaled down from ${naturalWidth} × ${naturalHeight}` : "sent as PNG";
  }
  const [width, height] = size(image, scale);
  const small = canvasOf(image, Math.min(1, THUMBNAIL / Math.max(naturalWidth, naturalHeight)), "white");
  return { url: await dataUrl(sent), thumbnail: small.toDataURL("image/jpeg", 0.85), name, width, height, note };
}

/** Return the current frame of a video as a JPEG file. */
export async function imageOf(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new File([await blobOf(canvas, "image/jpeg")], "camera.jpg", { type: "image/jpeg" });
}

async function decoded(file, name) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
    if (image.naturalWidth === 0) throw new Error("no size");
    return image;
  } catch {
    throw new Error(`${name} is not an image that this browser can show; give a PNG, JPEG, WebP, GIF or BMP file.`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

function size(image, scale) {
  return [image.naturalWidth, image.naturalHeight].map((length) => Math.max(1, Math.round(length * scale)));
}

function canvasOf(image, scale, ground = null) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = size(image, scale);
  const context = canvas.getContext("2d");
  if (ground) {
    context.fillStyle = ground; // JPEG has no transparency
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function reencoded(image, scale, type) {
  return blobOf(canvasOf(image, scale), type);
}

function blobOf(canvas, type) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("this browser cannot process an image of this size"))), type, 0.92);
  });
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the file cannot be read; it may have been moved or changed"));
    reader.readAsDataURL(blob);
  });
}
