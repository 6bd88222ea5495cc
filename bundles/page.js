// The page: a list of pictures, of which one at a time goes to the worker, and a view of the chosen one.
"use strict";

const at = (id) => document.getElementById(id);
const description = JSON.parse(at("description").textContent);
const names = description.output.classes;
// of the classes after the background; all are seen on grey and on skin, in print and by the colour-blind
const COLOURS = [[0, 200, 255], [255, 176, 0], [255, 64, 160], [120, 94, 240], [254, 97, 0], [60, 220, 60],
  [255, 255, 80], [180, 220, 255]];
const colourOf = (index) => COLOURS[(index - 1) % COLOURS.length];
const pictures = [];
let chosen = null;
let view = null;

// The worker, asked and answered

const pending = new Map();
let worker;

function startWorker() {
  const source = new Blob([at("worker").textContent], { type: "text/javascript" });
  worker = new Worker(URL.createObjectURL(source));
  worker.addEventListener("message", ({ data: { id, answer, error } }) => {
    const { resolve, reject } = pending.get(id);
    pending.delete(id);
    if (error === undefined) resolve(answer);
    else reject(new Error(error));
  });
  worker.addEventListener("error", (event) => {
    for (const { reject } of pending.values()) reject(new Error(event.message || "the program stopped"));
    pending.clear();
  });
}

let asked = 0;

function ask(task, content) {
  return new Promise((resolve, reject) => {
    pending.set(++asked, { resolve, reject });
    worker.postMessage({ id: asked, task, content });
  });
}

/** What the page holds packed (gzip) and written as letters (base64). */
async function embedded(id) {
  const letters = atob(at(id).textContent.trim());
  const packed = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
  at(id).remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function start() {
  try {
    startWorker();
    const [program, wasm, model] = await Promise.all(["program", "wasm", "model"].map(embedded));
    await ask("start", { program, wasm, model, about: description });
  } catch (error) {
    say(`This browser cannot run the page (${error.message}); use one of 2023 or newer.`);
    at("status").className = "error";
    return;
  }
  at("files").disabled = false;
  document.documentElement.dataset.ready = "true";
  say("Ready.");
  work();
}

const say = (text) => (at("status").textContent = text);

// The list

function add(files) {
  for (const file of files) {
    const [row, button, note] = ["li", "button", "span"].map((tag) => document.createElement(tag));
    const picture = { file, name: file.name || "pasted.png", row, button, note, state: "waiting" };
    button.type = "button";
    button.textContent = picture.name;
    button.addEventListener("click", async () => {
      await choose(picture);
      // on a phone it lies below the list
      at("layers").scrollIntoView({ block: "nearest" });
    });
    note.id = `note-${++added}`;
    button.setAttribute("aria-describedby", note.id);
    row.append(button, note);
    at("list").append(row);
    pictures.push(picture);
    describe(picture);
  }
  work();
}

let added = 0;

function describe(picture) {
  const { state, row, button, note } = picture;
  button.disabled = state !== "done";
  row.className = state;
  const text = { waiting: "waiting", working: "being segmented …", refused: picture.error }[state];
  note.textContent = text ?? result(picture);
}

function result(picture) {
  const found = areas(picture).filter(({ pixels }) => pixels);
  const shares = found.map(({ name, share }) => `${name} ${share} %`).join(", ");
  return [shares || `no ${names.slice(1).join(", no ")} found`, ...picture.notes].join("; ");
}

let working = false;

async function work() {
  // what is dropped before the network is there waits for it
  if (working || at("files").disabled) return;
  working = true;
  let picture;
  while ((picture = pictures.find(({ state }) => state === "waiting"))) {
    picture.state = "working";
    describe(picture);
    progress();
    try {
      Object.assign(picture, await ask("segment", { file: picture.file }), { state: "done" });
    } catch (error) {
      Object.assign(picture, { state: "refused", error: error.message });
    }
    // the list may have been cleared meanwhile
    if (!pictures.includes(picture)) continue;
    describe(picture);
    if (!chosen && picture.state === "done") choose(picture);
  }
  working = false;
  progress();
}

function progress() {
  const done = pictures.filter(({ state }) => state === "done").length;
  const refused = pictures.filter(({ state }) => state === "refused").length;
  const open = pictures.length - done - refused;
  at("list").setAttribute("aria-busy", String(open > 0));
  at("progress").hidden = !open;
  at("progress").max = Math.max(pictures.length, 1);
  at("progress").value = done + refused;
  at("clear").disabled = !pictures.length;
  at("save-all").disabled = open > 0 || done < 2;
  if (!pictures.length) return;
  const failed = pictures.filter(({ state }) => state === "refused").map(({ name, error }) => `${name}: ${error}`);
  const some = failed.length > 1 ? `${failed.length} not, the last of them` : "one not,";
  const more = failed.length ? `, ${some} ${failed.at(-1)}` : "";
  say(open ? `${done + refused} of ${pictures.length} done …` : `${done} segmented${more}.`);
}

// The chosen picture

async function choose(picture) {
  chosen = picture;
  for (const { button } of pictures) button.setAttribute("aria-current", String(button === picture.button));
  try {
    const found = await ask("show", { file: picture.file, packed: picture.packed });
    if (chosen !== picture) return;
    view = found;
  } catch (error) {
    say(`${picture.name}: ${error.message}`);
    return;
  }
  at("viewer").hidden = false;
  at("shown").textContent = picture.name;
  for (const id of ["picture", "overlay"]) Object.assign(at(id), { width: view.width, height: view.height });
  // the whole picture is seen at once
  at("layers").style.maxWidth = `calc(75vh * ${view.width / view.height})`;
  at("picture").getContext("2d").putImageData(new ImageData(view.pixels, view.width, view.height), 0, 0);
  at("save").href = picture.address ??= URL.createObjectURL(picture.mask);
  at("save").download = maskName(picture);
  draw();
  tabulate();
}

const maskName = ({ name }) => `${name.replace(/\.[^.]*$/, "") || name}_mask.png`;

/** The overlay: areas as opaque as asked for, and outlines. */
function draw() {
  if (!view) return;
  const { width, height, classes } = view;
  const area = Math.round(2.55 * at("opacity").value);
  const thickness = at("outline").checked ? Math.max(1, Math.round(Math.max(width, height) / 400)) : 0;
  const image = new ImageData(width, height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const index = classes[i];
      if (!index) continue;
      let edge = false;
      for (let step = 1; step <= thickness && !edge; step++) {
        edge = x < step || y < step || x + step >= width || y + step >= height || classes[i - step] !== index
          || classes[i + step] !== index || classes[i - step * width] !== index || classes[i + step * width] !== index;
      }
      image.data.set([...colourOf(index), edge ? 255 : area], 4 * i);
    }
  }
  at("overlay").getContext("2d").putImageData(image, 0, 0);
}

/** The area of each class but the background: pixels, share of the picture, mm² where the pixel size is known. */
function areas({ counts, width, height }) {
  const millimetres = pixelSize();
  return names.slice(1).map((name, i) => {
    const pixels = counts[i + 1];
    const area = millimetres && pixels * millimetres ** 2;
    const square = millimetres ? (area < 1000 ? String(Number(area.toPrecision(4))) : area.toFixed(0)) : "";
    return { name, pixels, share: ((100 * pixels) / (width * height)).toFixed(2), square };
  });
}

function pixelSize() {
  const typed = at("pixel").value.trim().replace(",", ".");
  const number = Number(typed);
  const wrong = typed !== "" && !(number > 0 && Number.isFinite(number));
  at("pixel-error").textContent = wrong ? "A number above 0, for instance 0.07" : "";
  at("pixel").setAttribute("aria-invalid", String(wrong));
  return typed === "" || wrong ? null : number;
}

function tabulate() {
  if (!chosen?.counts) return;
  const found = areas(chosen);
  const rows = found.map(({ name, pixels, share, square }, i) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    const colour = document.createElement("i");
    head.scope = "row";
    colour.style.background = `rgb(${colourOf(i + 1)})`;
    head.append(colour, name);
    row.append(head);
    for (const text of [pixels, share, square || "–"]) row.insertCell().textContent = text;
    return row;
  });
  at("areas").tBodies[0].replaceChildren(...rows);
  const said = found.map(({ name, pixels, share }) => `${name} ${pixels} px², ${share} %`).join("; ");
  at("picture").setAttribute("aria-label", `${chosen.name}, outlined: ${said}`);
}

/** Masks and a table of the areas in one archive; equal names are told apart. */
async function saveAll() {
  const done = pictures.filter(({ state }) => state === "done");
  const taken = new Set();
  const lines = [["image", "class", "pixels", "percent", "mm2"]];
  const files = done.map((picture) => {
    const name = maskName(picture);
    let unique = name;
    for (let i = 2; taken.has(unique.toLowerCase()); i++) unique = name.replace(/_mask\.png$/, ` (${i})_mask.png`);
    taken.add(unique.toLowerCase());
    for (const { name: structure, pixels, share, square } of areas(picture)) {
      lines.push([picture.name, structure, pixels, share, square]);
    }
    return [unique, picture.mask];
  });
  const quoted = (cell) => (/[",\r\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell);
  const table = lines.map((line) => `${line.map(quoted).join(",")}\r\n`).join("");
  files.push(["areas.csv", new Blob([table])]);
  const link = document.createElement("a");
  const address = URL.createObjectURL(await ask("archive", { files }));
  Object.assign(link, { href: address, download: "masks.zip" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
  say(`masks.zip holds ${done.length} masks and areas.csv.`);
}

// What a person does

at("files").addEventListener("change", () => {
  add(at("files").files);
  at("files").value = "";
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dragged");
  });
}
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragged");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragged");
  if (event.dataTransfer.files.length) add(event.dataTransfer.files);
  else say("What was dropped holds no files.");
});
at("opacity").addEventListener("input", draw);
at("outline").addEventListener("change", draw);
at("pixel").addEventListener("input", tabulate);
at("save-all").addEventListener("click", saveAll);
at("clear").addEventListener("click", () => {
  for (const { address } of pictures) if (address) URL.revokeObjectURL(address);
  pictures.length = 0;
  chosen = view = null;
  at("list").replaceChildren();
  at("viewer").hidden = true;
  progress();
  say("The list is empty.");
  at("files").focus();
});
start();
