// transformers.js: an artifact by its `dtype`, on onnxruntime-node.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const [jobFile, modules] = process.argv.slice(2);
const require = createRequire(join(modules, "package.json"));
const { env, pipeline } = await import(pathToFileURL(require.resolve("@huggingface/transformers")));

const job = JSON.parse(readFileSync(jobFile, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(job.directory);
const extract = await pipeline("feature-extraction", basename(job.directory), { dtype: job.dtype });
const rows = [];
for (let start = 0; start < job.texts.length; start += 7) {
  const texts = job.texts.slice(start, start + 7);
  const vectors = await extract(texts, { pooling: job.pooling, normalize: true });
  rows.push(Buffer.from(Float32Array.from(vectors.data).buffer));
}
writeFileSync(job.output, Buffer.concat(rows));
console.log(JSON.stringify({ max_seq_length: extract.tokenizer.model_max_length }));
