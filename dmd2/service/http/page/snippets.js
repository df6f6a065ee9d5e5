// "Copy as": the same image by other means.

import { body as fields } from "./request.js";

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`; // for a POSIX shell
const body = (request) => ({ ...fields(request), response_format: "b64_json" });

/** JSON as Python has it: only strings, numbers, lists and objects occur. */
const literal = (value) => JSON.stringify(value);

function curl(request, base, secured) {
  const header = secured ? ` \\\n  -H "Authorization: Bearer $DMD2_API_KEY"` : "";
  return `curl -s ${base}/v1/images/generations${header} \\
  -H 'Content-Type: application/json' \\
  -d ${quoted(JSON.stringify(body(request)))} |
  python3 -c 'import base64, json, sys; open("image.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'
`;
}

function python(request, base, secured) {
  const header = secured ? `\n    headers={"Authorization": "Bearer " + os.environ["DMD2_API_KEY"]},` : "";
  const lines = Object.entries(body(request)).map(([name, value]) => `        "${name}": ${literal(value)},`);
  return `import base64
${secured ? "import os\n" : ""}from pathlib import Path

import httpx

answer = httpx.post(
    "${base}/v1/images/generations",${header}
    json={
${lines.join("\n")}
    },
    timeout=600,
)
answer.raise_for_status()
Path("image.png").write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
`;
}

function openai(request, base, secured) {
  const { model, prompt, response_format, ...extra } = body(request);
  const lines = Object.entries(extra).map(([name, value]) => `"${name}": ${literal(value)}`);
  return `import base64
${secured ? "import os\n" : ""}from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="${base}/v1", api_key=${secured ? 'os.environ["DMD2_API_KEY"]' : '"none"'})
answer = client.images.generate(
    model=${literal(model)},
    prompt=${literal(prompt)},
    response_format=${literal(response_format)},
    extra_body={${lines.join(", ")}},
)
Path("image.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
`;
}

export const snippets = { curl, python, openai };
