// What the form says, as the server's API has it.

const field = (name) => document.querySelector("#form").elements[name];

/** The API key that was typed; empty where none is needed. */
export const key = () => field("key").value;

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
