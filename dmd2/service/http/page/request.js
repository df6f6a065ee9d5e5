// What the form says, as the server's API has it.

const field = (name) => document.querySelector("#form").elements[name];

/** The API key that was typed; empty where none is needed. */
export const key = () => field("key").value.trim();

/** The header that brings it. Only ASCII can be in one; other keys are none. */
export const bearer = () => (/^[!-~]+$/.test(key()) ? { Authorization: `Bearer ${key()}` } : {});

/** A websocket's subprotocols, which have no `/`, `=` and others of a key's letters: it is in base64url. */
export function protocols() {
  const coded = btoa(String.fromCharCode(...new TextEncoder().encode(key())));
  return ["dmd2", ...(coded ? [`key64.${coded.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`] : [])];
}

/** "owner/name:0.8, other" → [{path, scale}, …] */
export function loras(text) {
  const found = text.split(/[\s,]+/).filter(Boolean);
  return found.map((each) => {
    const [, path, scale] = each.match(/^(.*?)(?::(-?\d+(?:\.\d+)?))?$/);
    return { path, scale: scale === undefined ? 1 : Number(scale) };
  });
}

/** The fields that websocket and HTTP share; undefined ones are not sent. */
export function body({ model, prompt, num_inference_steps, seed, loras: adapters }) {
  return { model, prompt, num_inference_steps, seed, ...(adapters?.length ? { loras: adapters } : {}) };
}
