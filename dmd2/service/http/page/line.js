// Where images come from, one at a time. What is asked for meanwhile replaces what waited: stale requests are never sent.
//
// Both kinds have `ask(request)`, `forget()`, `release()` and tell `image(blob, about, request)` or
// `failed(message, request)`, and before that `waits(error, seconds)` if the server says when to ask again.

import { bearer, body, protocols } from "./request.js";

const FIRST_PAUSE = 500; // ms before the first attempt to connect again; doubled each time
const LONGEST_PAUSE = 10_000;
const LONGEST_WAIT = 300; // s until the server is asked again, whatever it says
const MOST_REFUSALS = 20; // in a row; then the last one is an error

class Line {
  asked = null; // the request on its way
  next = null; // the newest that waits
  held = 0; // the timer, while the server wants to be left alone
  refusals = 0; // in a row

  constructor(told) {
    this.told = told;
  }

  ask(request) {
    this.next = request;
    this.send();
  }

  /** Whatever is on its way is of no use any more. */
  forget() {
    this.next = null;
    if (this.asked) this.asked = { ...this.asked, forgotten: true };
  }

  /** There is no room, or the key's rate is used up: what is newest by then is asked for when the server says. */
  refused(error) {
    const seconds = Math.min(error.retry_after, LONGEST_WAIT);
    this.refusals += 1;
    if (!this.asked || !(seconds > 0) || this.refusals > MOST_REFUSALS) {
      return this.done((request) => this.told.failed(error.message, request));
    }
    if (!this.asked.forgotten) this.next ??= this.asked;
    this.asked = null;
    this.held = setTimeout(() => this.release(), 1000 * seconds);
    if (this.next) this.told.waits(error, seconds);
  }

  /** Waits no longer. */
  release() {
    clearTimeout(this.held);
    this.held = 0;
    this.send();
  }

  done(tell) {
    const request = this.asked;
    this.asked = null;
    this.refusals = 0;
    this.send(); // first: the network shall not wait for the page
    if (request && !request.forgotten) tell(request);
  }
}

/** By words: over a websocket. */
export class Words extends Line {
  #socket = null;
  #open = false;
  #later = 0; // the timer of the next attempt
  #about = null; // of the binary message to come
  #pause = FIRST_PAUSE;
  #count = 0;

  /** @param told also `state(open)` */
  constructor(told) {
    super(told);
    this.connect();
  }

  /** Anew and at once: the key is another. */
  reconnect() {
    this.#pause = FIRST_PAUSE;
    this.connect();
  }

  connect() {
    clearTimeout(this.#later);
    this.#lose();
    const address = new URL("ws/generate", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    const socket = (this.#socket = new WebSocket(address, protocols()));
    socket.binaryType = "blob";
    socket.onopen = () => {
      this.#open = true;
      this.#pause = FIRST_PAUSE;
      this.told.state(true);
      this.send();
    };
    socket.onmessage = ({ data }) => this.#take(data);
    socket.onclose = () => {
      this.#lose();
      this.told.state(false);
      this.#later = setTimeout(() => this.connect(), this.#pause);
      this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE);
    };
  }

  #lose() {
    if (this.#socket) {
      this.#socket.onopen = this.#socket.onmessage = this.#socket.onclose = null;
      this.#socket.close();
    }
    this.#socket = null;
    this.#open = false;
    if (this.asked && !this.asked.forgotten) this.next ??= this.asked; // it never came
    this.asked = this.#about = null;
  }

  send() {
    if (!this.#open || this.held || this.asked || !this.next) return;
    [this.asked, this.next] = [this.next, null];
    this.#socket.send(JSON.stringify({ id: ++this.#count, output_format: "png", ...body(this.asked) }));
  }

  #take(data) {
    if (typeof data !== "string") {
      const about = this.#about;
      this.#about = null;
      return this.done((request) => this.told.image(data, about, request));
    }
    const about = JSON.parse(data);
    if (about.type === "image") this.#about = about;
    else if (about.type === "error") this.refused(about.error);
    else if (about.type === "stale") this.done(() => {});
  }
}

/** By an image and words: over HTTP, as a form. */
export class Edits extends Line {
  #stop = null;

  forget() {
    super.forget();
    this.#stop?.abort();
  }

  send() {
    if (this.held || this.asked || !this.next) return;
    [this.asked, this.next] = [this.next, null];
    this.#stop = new AbortController();
    this.#post(this.asked, this.#stop.signal).then(
      ({ blob, about }) => this.done((request) => this.told.image(blob, about, request)),
      (error) => this.refused(error),
    );
  }

  async #post(request, signal) {
    const [{ blob, ...about }] = await several(request, 1, signal);
    return { blob, about };
  }
}

/** `n` seeds, from the request's own on, over HTTP: as `images`. */
export function several({ image, mask, strength, ...words }, n, signal) {
  const { loras, ...fields } = { ...body(words), n, response_format: "b64_json" };
  if (!image) {
    const headers = { "Content-Type": "application/json" };
    return images("v1/images/generations", { headers, body: JSON.stringify({ ...fields, loras }), signal });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== undefined) form.set(name, value);
  if (loras) form.set("loras", JSON.stringify(loras));
  form.set("prompt_strength", strength);
  form.set("image", image, "image.png");
  if (mask) form.set("mask", mask, "mask.png");
  return images("v1/images/edits", { body: form, signal });
}

/** Posts to OpenAI's API: [{blob, seed, seconds}]. Throws what the server says is wrong, with its `code` and, if it says, `retry_after`. */
async function images(path, { headers, ...rest }) {
  const began = performance.now();
  const answer = await fetch(path, { method: "POST", headers: { ...headers, ...bearer() }, ...rest });
  const told = await answer.json();
  if (!answer.ok) {
    const error = new Error(told.error?.message ?? `status ${answer.status}`);
    throw Object.assign(error, { code: told.error?.code, retry_after: Number(answer.headers.get("Retry-After")) });
  }
  const seconds = { all: (performance.now() - began) / 1000 };
  return told.data.map(({ b64_json, seed }) => {
    const bytes = Uint8Array.from(atob(b64_json), (character) => character.charCodeAt(0));
    return { blob: new Blob([bytes], { type: "image/png" }), seed, seconds };
  });
}
