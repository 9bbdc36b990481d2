// onnxruntime-node and onnxruntime-web (WebAssembly): an ONNX file on token ids, its first output out.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [jobFile, modules] = process.argv.slice(2);
const job = JSON.parse(readFileSync(jobFile, "utf8"));
const require = createRequire(join(modules, "package.json"));
const ort = require(job.runtime);

const web = job.runtime === "onnxruntime-web";
if (web) ort.env.wasm.numThreads = 1;
const bytes = new Uint8Array(readFileSync(join(job.directory, job.file)));
const session = await ort.InferenceSession.create(bytes, { executionProviders: [web ? "wasm" : "cpu"] });
const tensor = (rows) =>
  new ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
const parts = [];
for (const { input_ids, attention_mask } of job.batches) {
  const feeds = { input_ids: tensor(input_ids), attention_mask: tensor(attention_mask) };
  const hidden = (await session.run(feeds))[session.outputNames[0]];
  parts.push(Buffer.from(Float32Array.from(hidden.data).buffer));
}
writeFileSync(job.output, Buffer.concat(parts));
console.log(JSON.stringify({ outputs: session.outputNames }));
