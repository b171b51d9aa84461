"use strict";

const $ = (id) => document.getElementById(id);
const BOX = /\[\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*\]/g;
// Of an image's file; what the server would not take is drawn anew, and smaller
const MAX_BYTES = 15e6, MAX_PIXELS = 50e6;
const SERVED = /^data:[^,]*,(iVBORw0KGgo|\/9j\/|R0lGOD|UklGR|Qk)/; // PNG, JPEG, GIF, WebP, BMP by their first bytes
const REDRAWN_SIDE = 3072;

let model = null;
let messages = []; // of the conversation, as the server takes them
let picture = null; // {url, element} of the image that is shown
let sent = false; // whether the conversation has it already
let running = null; // AbortController of the answer that streams

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function findModel() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) {
    $("keyrow").hidden = false;
    $("model").textContent = "an API key is wanted";
    return;
  }
  model = (await answer.json()).data[0].id;
  $("model").textContent = model;
}

function draw(boxes) {
  const canvas = $("picture"), image = picture.element, pen = canvas.getContext("2d");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  pen.drawImage(image, 0, 0);
  pen.lineWidth = Math.max(3, canvas.width / 300);
  pen.strokeStyle = "#e8710a";
  for (const [left, top, right, bottom] of boxes) {
    pen.strokeRect(left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height);
  }
  canvas.dataset.boxes = JSON.stringify(boxes);
  canvas.setAttribute("aria-label", boxes.length ? `${picture.name}, ${boxes.length} box(es) marked` : picture.name);
}

function boxesOf(text) {
  const found = [...text.matchAll(BOX)].map((match) => match.slice(1, 5).map(Number));
  return found.filter(([left, top, right, bottom]) => left < right && top < bottom && right <= 1 && bottom <= 1);
}

function redrawn(element) {
  const factor = Math.min(1, REDRAWN_SIDE / Math.max(element.naturalWidth, element.naturalHeight));
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = Math.max(1, Math.round(element.naturalWidth * factor));
  canvas.height = Math.max(1, Math.round(element.naturalHeight * factor));
  pen.fillStyle = "#fff"; // as the server has what is transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(element, 0, 0, canvas.width, canvas.height);
  const url = canvas.toDataURL("image/png");
  return url.length <= MAX_BYTES ? url : canvas.toDataURL("image/jpeg", 0.92);
}

async function show(blob, name) {
  let url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  const element = new Image();
  element.src = url;
  try {
    await element.decode();
  } catch {
    say("error", `${name} is no image that this browser can show.`);
    return;
  }
  const pixels = element.naturalWidth * element.naturalHeight;
  if (blob.size > MAX_BYTES || pixels > MAX_PIXELS || !SERVED.test(url)) url = redrawn(element);
  running?.abort();
  picture = { url, element, name };
  sent = false;
  messages = [];
  $("log").replaceChildren();
  $("picture").hidden = false;
  $("hint").hidden = true;
  $("remove").disabled = false;
  draw([]);
  $("question").focus();
}

function removePicture() {
  running?.abort();
  picture = null;
  messages = [];
  $("log").replaceChildren();
  $("picture").hidden = true;
  $("hint").hidden = false;
  $("remove").disabled = true;
}

function say(who, text) {
  const line = document.createElement("p"), name = document.createElement("span"), said = document.createElement("span");
  line.className = who;
  name.className = "who";
  name.textContent = { user: "You: ", assistant: "Answer: ", error: "Error: " }[who];
  said.textContent = text;
  line.append(name, said);
  $("log").append(line);
  $("log").scrollTop = $("log").scrollHeight;
  return said;
}

// Server-sent events -> the objects in them
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const data = held.slice(0, end).replace(/^data: /, "");
      held = held.slice(end + 2);
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(question) {
  const content = [{ type: "text", text: question }];
  const talk = messages, withPicture = picture !== null && !sent;
  if (withPicture) content.push({ type: "image_url", image_url: { url: picture.url } });
  const turn = { role: "user", content };
  say("user", question);
  const said = say("assistant", "");
  $("log").setAttribute("aria-busy", "true"); // read out once it is whole
  const begin = performance.now();
  let first = null, pieces = 0, text = "";
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  for (const id of ["first", "rate", "count"]) $(id).textContent = "–";
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        model, messages: [...messages, turn], stream: true, stream_options: { include_usage: true },
        temperature: 0, max_tokens: Number($("tokens").value) || 256,
      }),
    });
    if (answer.status === 401) $("keyrow").hidden = false;
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      const now = performance.now();
      const piece = event.choices[0]?.delta.content;
      if (piece) {
        first ??= now;
        pieces += 1;
        text += piece;
        said.textContent = text;
        $("log").scrollTop = $("log").scrollHeight;
      }
      const count = event.usage?.completion_tokens ?? pieces;
      if (first !== null) {
        $("first").textContent = `${Math.round(first - begin)} ms`;
        if (count > 1 && now > first) $("rate").textContent = `${((1000 * (count - 1)) / (now - first)).toFixed(1)} tokens/s`;
        $("count").textContent = `${count} tokens`;
      }
    }
    keep();
  } catch (error) {
    if (error.name === "AbortError") keep();
    else {
      said.parentElement.remove();
      say("error", error.message);
    }
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    $("log").removeAttribute("aria-busy");
  }

  function keep() {
    if (messages !== talk) return; // another image or conversation has begun
    messages.push(turn, { role: "assistant", content: text });
    sent ||= withPicture;
    if (picture) draw(boxesOf(text));
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  try {
    if (model === null) await findModel();
  } catch (error) {
    say("error", error.message);
  }
  if (model === null) return;
  $("question").value = "";
  await ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  sent = false;
  $("log").replaceChildren();
  if (picture) draw([]);
  $("question").focus();
});
$("remove").addEventListener("click", removePicture);
$("file").addEventListener("change", () => {
  const file = $("file").files[0];
  if (file) show(file, file.name);
  $("file").value = "";
});
$("example").addEventListener("click", async () => {
  const answer = await fetch("example.png");
  await show(await answer.blob(), "example.png");
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) show(file, file.name);
});
for (const kind of ["dragover", "dragenter"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const file = [...event.dataTransfer.files].find((one) => one.type.startsWith("image/"));
  if (file) show(file, file.name);
});
findModel().catch((error) => { $("model").textContent = `not reached: ${error.message}`; });
