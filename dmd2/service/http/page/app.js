// The page: what is typed is generated at once, in one step, in four, or in both.

import * as gallery from "./gallery.js";
import { Edits, several, Words } from "./line.js";
import { bearer, key, loras } from "./request.js";
import { snippets } from "./snippets.js";

const $ = (selector) => document.querySelector(selector);
const form = $("#form");
const { elements: field } = form;
const figures = [...document.querySelectorAll("figure")]; // of the fewest steps, and of the most
const mask = $("canvas.mask");
const SETTINGS = "settings"; // of localStorage
const BUSY = { queue_full: "The queue is full", rate_limit_exceeded: "The rate of this key or address is used up" };
const PAUSE = 250; // ms without typing, before the slower image is asked for

let models = [];
let given = null; // the image to begin with, a PNG at about the model's size
let painted = null; // the mask: a file, or a PNG that is white where it was painted; null if there is none
let shown = null; // the image that "Keep" and "Download" mean: {blob, request}
let later = 0;

// What is asked for

const model = () => models.find(({ id }) => id === field.model.value) ?? models[0];

/** [figure, number of steps] of each image that is wanted, the faster one first. */
function wanted() {
  const has = model()?.steps ?? [1, 4];
  const all = has.length > 1 ? [[0, Math.min(...has)], [1, Math.max(...has)]] : [[0, has[0]]];
  if (field.steps.value === "both" || all.length === 1) return all;
  return field.steps.value === "most" ? all.slice(1) : all.slice(0, 1);
}

const counted = (n) => (n === 1 ? "1 step" : `${n} steps`);

function request(num_inference_steps) {
  const prompt = classes().length ? field.class_name.value : field.prompt.value.trim();
  const asked = { model: model()?.id, prompt, num_inference_steps, seed: seed(), loras: loras(field.loras.value) };
  return given ? { ...asked, image: given, mask: painted, strength: Number(field.strength.value) } : asked;
}

function seed() {
  const value = Math.trunc(Number(field.seed.value));
  return Number.isFinite(value) ? Math.min(Math.max(value, 0), 4294967295) : 0;
}

/** Shows as many figures as are wanted, and returns what `wanted` does. */
function arrange() {
  const asked = wanted();
  figures.forEach((figure, place) => {
    const n = asked.find(([where]) => where === place)?.[1];
    figure.hidden = n === undefined;
    figure.dataset.steps = n ?? "";
    figure.querySelector("figcaption").textContent = n === undefined ? "" : counted(n);
  });
  figures[asked[0][0]].querySelector(".frame").append(mask);
  return asked;
}

function forget(lines) {
  clearTimeout(later);
  for (const line of lines) line.forget();
}

/** Asks for what the form says now: the faster image at once, the slower one when the typing pauses. */
function changed({ now = false } = {}) {
  remember();
  const asked = arrange();
  if (!request(1).prompt) {
    forget([...words, ...edits]);
    return locked || say(model() ? "Type what you want to see." : "Connecting …");
  }
  const [used, unused] = given ? [edits, words] : [words, edits];
  forget(unused);
  const [[place, n], ...slow] = asked;
  used[place].ask(request(n));
  const rest = () => slow.forEach(([where, most]) => used[where].ask(request(most)));
  if (now) rest();
  else later = setTimeout(rest, PAUSE);
}

// What came

function say(text, bad = false) {
  $("#status").textContent = text;
  $("#status").classList.toggle("bad", bad);
}

let locked = false; // whether the server wants another key than there is, which it says once
let lost = false; // whether a connection was, so that another server may answer now
const told = (place) => ({
  image: (blob, about, asked) => show(place, blob, about, asked),
  failed: (message) => say(message, true),
  waits: ({ code, message }, seconds) => say(`${BUSY[code] ?? message}; asking again in ${seconds} s …`),
  state: (there) => {
    if (!there && !locked) say("The connection is lost; trying again …", true);
    else if (lost) begin();
    lost = !there;
  },
});
const words = figures.map((_, place) => new Words(told(place)));
const edits = figures.map((_, place) => new Edits(told(place)));

function show(place, blob, about, asked) {
  put(place, blob, asked);
  const seconds = Object.values(about.seconds).reduce((sum, each) => sum + each, 0);
  say(`${counted(asked.num_inference_steps)}: ${Math.round(1000 * seconds)} ms`);
}

function put(place, blob, asked) {
  const image = figures[place].querySelector("img");
  const old = image.src;
  image.src = URL.createObjectURL(blob);
  image.alt = asked.prompt;
  image.onload = () => {
    if (old) URL.revokeObjectURL(old);
  };
  // What it shows, for whoever looks from outside.
  image.dataset.prompt = asked.prompt;
  image.dataset.from = asked.mask || asked.with_mask ? "mask" : asked.image || asked.with_image ? "image" : "noise";
  shown = { blob, request: asked };
}

// The image to begin with, and its mask

async function begins(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return say(`${file.name}: not an image that this browser reads; PNG, JPEG and WebP are.`, true);
  }
  const [width, height] = (model()?.size ?? "1024x1024").split("x").map(Number);
  const scale = Math.min(1, Math.sqrt((width * height) / (bitmap.width * bitmap.height)));
  const canvas = new OffscreenCanvas(Math.max(16, Math.round(bitmap.width * scale)), Math.max(16, Math.round(bitmap.height * scale)));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  given = await canvas.convertToBlob({ type: "image/png" });
  [mask.width, mask.height] = [canvas.width, canvas.height];
  clearMask();
  $("#with-image").hidden = false;
  $("#more").open = true;
  changed({ now: true });
}

function clearMask() {
  painted = null;
  field.mask.value = "";
  clearCanvas();
}

function clearCanvas() {
  const context = mask.getContext("2d");
  context.fillStyle = "black";
  context.fillRect(0, 0, mask.width, mask.height);
}

function paint(event) {
  const box = mask.getBoundingClientRect();
  const scale = Math.max(mask.width / box.width, mask.height / box.height); // the image is fitted into its square
  const x = (event.clientX - box.left - box.width / 2) * scale + mask.width / 2;
  const y = (event.clientY - box.top - box.height / 2) * scale + mask.height / 2;
  const context = mask.getContext("2d");
  context.fillStyle = "white";
  context.beginPath();
  context.arc(x, y, (Number(field.brush.value) / 100) * Math.max(mask.width, mask.height), 0, 2 * Math.PI);
  context.fill();
}

mask.addEventListener("pointerdown", (event) => {
  mask.setPointerCapture(event.pointerId);
  if (field.mask.value) clearMask(); // what is painted takes the file's place
  paint(event);
});
mask.addEventListener("pointermove", (event) => event.buttons && paint(event));
mask.addEventListener("pointerup", () =>
  mask.toBlob((blob) => {
    painted = blob;
    changed({ now: true });
  }),
);

field.paint.addEventListener("change", () => {
  mask.hidden = !field.paint.checked;
});
$("#clear-mask").addEventListener("click", () => {
  clearMask();
  changed({ now: true });
});
field.mask.addEventListener("change", () => {
  const [file] = field.mask.files;
  if (!file) return;
  clearCanvas();
  painted = file;
  changed({ now: true });
});
function dropImage() {
  given = painted = null;
  field.image.value = field.mask.value = "";
  field.paint.checked = false;
  mask.hidden = $("#with-image").hidden = true;
}
$("#drop-image").addEventListener("click", () => {
  dropImage();
  changed({ now: true });
});
field.image.addEventListener("change", () => field.image.files[0] && begins(field.image.files[0]));

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files[0]) begins(event.dataTransfer.files[0]);
});

// Gallery, seeds, files, text to copy

function settings({ image, mask: painting, ...rest }) {
  return { ...rest, ...(image ? { with_image: true } : {}), ...(painting ? { with_mask: true } : {}) }; // kept without files
}

async function keep() {
  if (!shown) return;
  await gallery.add({ blob: shown.blob, settings: settings(shown.request) });
  await showGallery();
}

async function showGallery() {
  const items = (await gallery.all()).reverse();
  $("#empty").hidden = items.length > 0;
  for (const image of document.querySelectorAll("#gallery img")) URL.revokeObjectURL(image.src);
  $("#gallery ul").replaceChildren(...items.map(entry));
}

function entry({ key, blob, settings: its }) {
  const item = document.createElement("li");
  const open = document.createElement("button");
  const image = document.createElement("img");
  const remove = document.createElement("button");
  open.className = "open";
  open.type = remove.type = "button";
  open.title = "Back to these settings";
  image.src = URL.createObjectURL(blob);
  image.alt = its.prompt;
  open.append(image);
  open.addEventListener("click", () => back(its, blob));
  remove.className = "remove";
  remove.textContent = "Remove";
  remove.setAttribute("aria-label", `Remove ${its.prompt}, seed ${its.seed}`);
  remove.addEventListener("click", () => gallery.remove(key).then(showGallery));
  const caption = document.createElement("span");
  caption.textContent = `${its.prompt} · seed ${its.seed} · ${counted(its.num_inference_steps)}`;
  item.append(open, caption, remove);
  return item;
}

function back(its, blob) {
  if (models.some(({ id }) => id === its.model)) field.model.value = its.model;
  choose();
  field.prompt.value = field.class_name.value = its.prompt;
  field.seed.value = its.seed;
  field.steps.value = its.num_inference_steps === Math.min(...(model()?.steps ?? [1])) ? "fewest" : "most";
  field.loras.value = (its.loras ?? []).map(({ path, scale }) => (scale === 1 ? path : `${path}:${scale}`)).join(" ");
  field.strength.value = its.strength ?? field.strength.value;
  scrollTo({ top: 0 });
  if (its.with_image) {
    remember();
    forget([...words, ...edits]);
    put(arrange()[0][0], blob, its);
    return say("As it was kept. The image that it began with was not: give it again to make more of it.");
  }
  dropImage(); // it began without one
  changed({ now: true });
}

/** Eight seeds from this one on, into the gallery. */
async function grid() {
  const [[, n]] = wanted();
  const first = request(n);
  if (!first.prompt) return;
  say("Eight seeds …");
  try {
    const made = await several(first, 8);
    for (const { blob, seed: number } of made) await gallery.add({ blob, settings: { ...settings(first), seed: number } });
    say("Eight seeds are in the gallery.");
  } catch (error) {
    say(error.message, true);
  }
  await showGallery();
}

function download() {
  if (!shown) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(shown.blob);
  const name = shown.request.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  link.download = `${name}-${shown.request.seed}.${shown.blob.type.split("/")[1] ?? "png"}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function copy(kind) {
  $("#copy").open = false;
  if (given || shown?.request.with_image) return say("Not copied: text to copy is for what begins with words alone.", true);
  const [[, n]] = wanted();
  const text = snippets[kind](request(n), location.href.replace(/\/[^/]*$/, ""), Boolean(key()));
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch (error) {
    say(`Not copied: ${error.message}`, true);
  }
}

// The form

function remember() {
  const { prompt, steps: n, seed: number, loras, strength, brush } = field;
  const kept = { prompt: prompt.value, steps: n.value, seed: number.value, loras: loras.value, strength: strength.value, brush: brush.value };
  localStorage.setItem(SETTINGS, JSON.stringify(kept));
}

function recall() {
  const kept = { prompt: "", steps: "both", seed: "0", loras: "", strength: "0.8", brush: "10" };
  try {
    Object.assign(kept, JSON.parse(localStorage.getItem(SETTINGS) ?? "{}"));
  } catch {
    localStorage.removeItem(SETTINGS); // not ours
  }
  for (const [name, value] of Object.entries(kept)) if (field[name]) field[name].value = value;
}

/** The names of the model's classes, where it takes no words. */
const classes = () => (model()?.takes_prompts === false ? model().classes : []);

/** What the chosen model takes: words or one of its classes; and in how many steps. */
function choose() {
  const names = classes();
  const has = model()?.steps ?? [1, 4];
  const labels = document.querySelectorAll("#steps span");
  labels.forEach((label, place) => (label.textContent = place ? Math.max(...has) : Math.min(...has)));
  $("#steps").hidden = has.length < 2;
  $("#classes").hidden = !names.length;
  $("#words").hidden = names.length > 0;
  if (names.length && field.class_name.dataset.of !== model().id) {
    field.class_name.replaceChildren(...names.map((name) => new Option(name)));
    field.class_name.dataset.of = model().id;
  }
}

/** Once connected, and each time anew: another server may answer by then. */
async function begin() {
  const answer = await fetch("v1/models", { headers: bearer() }).catch(() => null);
  if (!answer) return; // the websockets say so, and call again
  locked = answer.status === 401;
  if (locked) {
    $("#key").hidden = false;
    $("#more").open = true;
    return say(key() ? "The server does not know this API key." : "This server wants an API key.", true);
  }
  $("#key").hidden = !key();
  models = (await answer.json()).data;
  if (!models.length) {
    say("The model is loading …");
    return setTimeout(begin, 1000);
  }
  const chosen = field.model.value;
  field.model.replaceChildren(...models.map(({ id }) => new Option(id)));
  if (models.some(({ id }) => id === chosen)) field.model.value = chosen;
  $("#models").hidden = models.length < 2;
  choose();
  changed({ now: true });
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", ({ target }) => {
  if (["image", "mask", "key", "paint", "brush"].includes(target.name)) return;
  if (target.name === "model") choose();
  changed({ now: target.name === "steps" || target.name === "model" });
});
field.key.addEventListener("change", () => {
  begin();
  for (const line of words) line.reconnect();
  for (const line of [...words, ...edits]) line.release();
});
function dice() {
  field.seed.value = Math.floor(Math.random() * 2 ** 32);
  changed({ now: true });
}
$("#dice").addEventListener("click", dice);
$("#grid").addEventListener("click", grid);
$("#keep").addEventListener("click", keep);
$("#download").addEventListener("click", download);
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
const keys = { KeyR: dice, KeyG: grid, KeyS: download };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey && event.key === "Enter") keep();
  else if (event.altKey && keys[event.code]) keys[event.code]();
  else return;
  event.preventDefault();
});

recall();
showGallery();
begin();
field.prompt.focus();
