// The official JavaScript package.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const { HOTNEURON_URL: baseURL, HOTNEURON_KEY: apiKey, HOTNEURON_MODEL: model } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model, messages, temperature: 0, max_tokens: 24 };

test("models", async () => {
  const names = [];
  for await (const found of client.models.list()) names.push(found.id);
  assert.deepEqual(names, [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("chat, stream and usage", async () => {
  const whole = await client.chat.completions.create(greedy);
  const text = whole.choices[0].message.content;
  assert.match(text, /Paris/);
  const stream = client.chat.completions.stream({
    ...greedy,
    stream_options: { include_usage: true },
  });
  let streamed = "";
  for await (const chunk of stream) streamed += chunk.choices[0]?.delta.content ?? "";
  assert.equal(streamed, text);
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, whole.choices[0].finish_reason);
  assert.deepEqual(final.usage, whole.usage);
});

test("n, seed, stop and logprobs", async () => {
  const sampled = { ...greedy, temperature: 1.5, n: 2, seed: 3 };
  const [first, again] = await Promise.all([
    client.chat.completions.create(sampled),
    client.chat.completions.create(sampled),
  ]);
  const texts = (reply) => reply.choices.map((choice) => choice.message.content);
  assert.equal(first.choices.length, 2);
  assert.deepEqual(texts(first), texts(again));
  const stopped = await client.chat.completions.create({
    ...greedy,
    stop: [" Paris"],
    logprobs: true,
    top_logprobs: 2,
  });
  assert.equal(stopped.choices[0].finish_reason, "stop");
  assert.doesNotMatch(stopped.choices[0].message.content, /Paris/);
  assert.equal(stopped.choices[0].logprobs.content[0].top_logprobs.length, 2);
});

test("a stream that is given up", async () => {
  const stream = await client.chat.completions.create({
    ...greedy,
    max_tokens: 1000,
    stream: true,
  });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "chat.completion.chunk");
    break;
  }
  stream.controller.abort();
});

test("errors are told apart", async () => {
  const ask = (change) => client.chat.completions.create({ ...greedy, ...change });
  await assert.rejects(ask({ model: "gpt-4" }), (error) => {
    assert(error instanceof OpenAI.NotFoundError);
    return error.code === "model_not_found" && error.param === "model";
  });
  const long = [{ role: "user", content: "word ".repeat(20_000) }];
  await assert.rejects(ask({ messages: long }), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    return error.code === "context_length_exceeded";
  });
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), (error) => {
    assert(error instanceof OpenAI.AuthenticationError);
    return error.code === "invalid_api_key";
  });
});
