// Runs beside the page, without access to it: decodes a picture, makes the network's input, runs it, returns the mask.
// What is done to a picture is what the description of the export says, so that masks are those of Python.
"use strict";

const MOST_PIXELS = 50e6;
const COPY_AGAIN = "copy or save it again";

/** What is wrong with a picture, in one line for its reader. */
class Refused extends Error {}

// Bytes

const ascii = (bytes, start, length) => String.fromCharCode(...bytes.subarray(start, start + length));
const isAt = (bytes, place, text) => ascii(bytes, place, text.length) === text;
const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

function find(bytes, text, start = 0) {
  for (let i = start; i + text.length <= bytes.length; i++) {
    if (bytes[i] === text.charCodeAt(0) && isAt(bytes, i, text)) return i;
  }
  return -1;
}

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}

/** Unpacks zlib's format; more bytes than `most` are an error. */
async function inflate(packed, most = Infinity) {
  const reader = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  let held = 0;
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw new Refused("its pixels are damaged");
    });
    if (done) return joined(parts);
    held += value.length;
    if (held > most) throw new Refused("its header claims fewer pixels than it holds");
    parts.push(value);
  }
}

async function deflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const CRCS = Uint32Array.from({ length: 256 }, (_, number) => {
  for (let bit = 0; bit < 8; bit++) number = number & 1 ? 0xedb88320 ^ (number >>> 1) : number >>> 1;
  return number;
});

function crc32(...parts) {
  let sum = 0xffffffff;
  for (const bytes of parts) for (const byte of bytes) sum = CRCS[(sum ^ byte) & 255] ^ (sum >>> 8);
  return ~sum >>> 0;
}

// A decoded picture is { width, height, channels, data, notes }: bytes, the 1 or 3 channels of a pixel beside each
// other, and what had to be guessed.

function checkSize(width, height) {
  if (!width || !height) throw new Refused("it has no pixels");
  if (width * height > MOST_PIXELS) {
    const fact = `${width} × ${height} pixels, more than the ${MOST_PIXELS / 1e6} million that this page takes`;
    throw new Refused(`${fact}; save it smaller`);
  }
}

// EXIF

/** The number of an EXIF orientation, 1 … 8; of XMP where EXIF has none. */
function orientationOf(exif, xmp) {
  let number;
  if (exif) {
    const view = viewOf(exif);
    const little = isAt(exif, 0, "II");
    if (exif.length < 14 || !(little || isAt(exif, 0, "MM"))) throw new Refused(`its EXIF is damaged; ${COPY_AGAIN}`);
    const start = view.getUint32(4, little);
    const entries = start + 2 <= exif.length ? view.getUint16(start, little) : 0;
    for (let i = 0, place = start + 2; i < entries && place + 12 <= exif.length; i++, place += 12) {
      if (view.getUint16(place, little) !== 0x0112) continue;
      const type = view.getUint16(place + 2, little);
      if (type === 1) number = exif[place + 8];
      else if (type === 3) number = view.getUint16(place + 8, little);
      else if (type === 4) number = view.getUint32(place + 8, little);
      else number = 1;
    }
  }
  if (number === undefined && xmp) {
    const found = /tiff:Orientation(?:="|>)([0-9])/.exec(new TextDecoder("latin1").decode(xmp));
    if (found) number = Number(found[1]);
  }
  return number >= 1 && number <= 8 ? number : 1;
}

/** The picture as viewers show it. */
function upright(picture, orientation) {
  if (orientation === 1) return picture;
  const { width, height, channels, data } = picture;
  const swaps = orientation > 4;
  const [across, down] = swaps ? [height, width] : [width, height];
  const fromRight = [2, 3, 7, 8].includes(orientation);
  const fromBelow = [3, 4, 6, 7].includes(orientation);
  const turned = new Uint8Array(data.length);
  for (let y = 0, to = 0; y < down; y++) {
    for (let x = 0; x < across; x++) {
      const [u, v] = swaps ? [y, x] : [x, y];
      const from = ((fromBelow ? height - 1 - v : v) * width + (fromRight ? width - 1 - u : u)) * channels;
      for (let c = 0; c < channels; c++) turned[to++] = data[from + c];
    }
  }
  return { ...picture, width: across, height: down, data: turned };
}

// PNG, by itself: browsers change 16 bits, colours and what is transparent

const PNG_CHANNELS = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 };
const PNG_BITS = { 0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 2, 4, 8], 4: [8, 16], 6: [8, 16] };
const ADAM7 = [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]];

async function decodePng(bytes) {
  const view = viewOf(bytes);
  const packed = [];
  let header, palette, exif, oldExif, xmp;
  let kind = "";
  for (let place = 8; kind !== "IEND"; ) {
    if (place + 12 > bytes.length) throw new Refused(`it ends too early; ${COPY_AGAIN}`);
    const length = view.getUint32(place);
    const end = place + 8 + length;
    kind = ascii(bytes, place + 4, 4);
    if (end + 4 > bytes.length) throw new Refused(`it ends too early; ${COPY_AGAIN}`);
    const content = bytes.subarray(place + 8, end);
    // an upper-case letter marks the chunks that pixels depend on
    if (kind[0] < "a" && crc32(bytes.subarray(place + 4, end)) !== view.getUint32(end)) {
      throw new Refused(`its checksum is wrong; ${COPY_AGAIN}`);
    }
    if (kind === "IHDR" && length === 13) header = viewOf(content);
    else if (kind === "PLTE") palette = content;
    else if (kind === "IDAT") packed.push(content);
    else if (kind === "eXIf") exif = content;
    else if (kind === "acTL" && (viewOf(content).getUint32(0) !== 1 || packed.length)) {
      throw new Refused("it holds several pictures; save each in a file of its own");
    } else if (kind === "iTXt" && isAt(content, 0, "XML:com.adobe.xmp\0")) xmp = content;
    else if (["tEXt", "zTXt", "iTXt"].includes(kind) && isAt(content, 0, "Raw profile type exif\0")) {
      oldExif = [kind, content];
    }
    place = end + 4;
  }
  if (!header) throw new Refused(`it has no header; ${COPY_AGAIN}`);
  const [width, height] = [header.getUint32(0), header.getUint32(4)];
  const [bits, colour, interlaced] = [header.getUint8(8), header.getUint8(9), header.getUint8(12)];
  if (!PNG_BITS[colour]?.includes(bits)) throw new Refused(`it is of a kind that there is not; ${COPY_AGAIN}`);
  checkSize(width, height);
  if (!exif && oldExif) exif = await rawProfile(...oldExif);

  const stored = PNG_CHANNELS[colour];
  const passes = (interlaced ? ADAM7 : [[0, 0, 1, 1]])
    .map(([x, y, across, down]) => ({ x, y, across, down, columns: Math.ceil((width - x) / across),
      rows: Math.ceil((height - y) / down) }))
    .filter(({ columns, rows }) => columns > 0 && rows > 0);
  const rowBytes = (columns) => Math.ceil((columns * bits * stored) / 8);
  const claimed = passes.reduce((sum, { columns, rows }) => sum + rows * (1 + rowBytes(columns)), 0);
  const lines = await inflate(joined(packed), claimed);
  if (lines.length !== claimed) throw new Refused(`its header claims more pixels than it holds; ${COPY_AGAIN}`);

  const samples = new (bits === 16 ? Uint16Array : Uint8Array)(width * height * stored);
  let start = 0;
  for (const { x, y, across, down, columns, rows } of passes) {
    const size = rowBytes(columns);
    unfilter(lines, start, size, rows, Math.max(1, (bits * stored) / 8));
    for (let row = 0; row < rows; row++) {
      const line = start + row * (size + 1) + 1;
      let to = ((y + row * down) * width + x) * stored;
      for (let column = 0, from = 0; column < columns; column++, to += (across - 1) * stored) {
        for (let c = 0; c < stored; c++, from++, to++) {
          if (bits === 8) samples[to] = lines[line + from];
          else if (bits === 16) samples[to] = (lines[line + 2 * from] << 8) | lines[line + 2 * from + 1];
          else samples[to] = packedSample(lines, line, from, bits);
        }
      }
    }
    start += rows * (size + 1);
  }
  const picture = { width, height, ...pngColours(samples, bits, colour, palette) };
  return upright(picture, orientationOf(exif, xmp));
}

/** One of several samples in a byte, the first in the highest bits. */
function packedSample(bytes, start, index, bits) {
  return (bytes[start + ((index * bits) >> 3)] >> (8 - bits - ((index * bits) & 7))) & ((1 << bits) - 1);
}

/** Undoes the filter of each line, in place. */
function unfilter(lines, start, size, rows, step) {
  for (let row = 0, line = start + 1; row < rows; row++, line += size + 1) {
    const filter = lines[line - 1];
    if (filter > 4) throw new Refused(`its pixels are damaged; ${COPY_AGAIN}`);
    if (filter === 0) continue;
    for (let i = 0; i < size; i++) {
      const left = i >= step ? lines[line + i - step] : 0;
      const above = row ? lines[line + i - size - 1] : 0;
      let guess = left;
      if (filter === 2) guess = above;
      else if (filter === 3) guess = (left + above) >> 1;
      else if (filter === 4) {
        const corner = row && i >= step ? lines[line + i - size - 1 - step] : 0;
        const [a, b, c] = [Math.abs(above - corner), Math.abs(left - corner), Math.abs(left + above - 2 * corner)];
        guess = a <= b && a <= c ? left : b <= c ? above : corner;
      }
      lines[line + i] += guess;
    }
  }
}

/** Samples as bytes of grey or colour, transparency dropped. */
function pngColours(samples, bits, colour, palette) {
  const stored = PNG_CHANNELS[colour];
  const count = samples.length / stored;
  if (colour === 3) {
    const data = new Uint8Array(3 * count);
    for (let i = 0; i < count; i++) {
      if (!(3 * samples[i] + 2 < palette?.length)) throw new Refused(`its palette is too short; ${COPY_AGAIN}`);
      for (let c = 0; c < 3; c++) data[3 * i + c] = palette[3 * samples[i] + c];
    }
    return { channels: 3, data, notes: [] };
  }
  const channels = stored < 3 ? 1 : 3;
  const data = new Uint8Array(channels * count);
  let highest = 0;
  for (let i = 0; i < samples.length; i++) if (samples[i] > highest) highest = samples[i];
  if (bits === 16 && colour !== 0 && highest >> 8 > 0 && highest >> 8 < 16) {
    const fact = `16 bits for each colour, of which the highest 4 are used up to ${highest >> 8}`;
    throw new Refused(`${fact}; save it with 8 bits for each colour`);
  }
  // of 16 bits: grey by its highest value, colours by their higher byte
  const full = bits < 16 ? (1 << bits) - 1 : highest > 4095 ? 65535 : highest > 255 ? 4095 : 255;
  const guessed = bits === 16 && colour === 0 && full < 65535 && highest > 0;
  const notes = guessed ? [`16 bits, no value above ${full}: taken for ${full > 255 ? 12 : 8} bits`] : [];
  for (let i = 0; i < count; i++) {
    for (let c = 0; c < channels; c++) {
      const value = samples[i * stored + c];
      if (bits === 8) data[i * channels + c] = value;
      else data[i * channels + c] = bits === 16 && colour !== 0 ? value >> 8 : Math.round((value * 255) / full);
    }
  }
  return { channels, data, notes };
}

/** EXIF as older programs write it into PNG: a text of hexadecimal digits, often packed. */
async function rawProfile(kind, content) {
  const rest = content.subarray(content.indexOf(0) + 1);
  if (kind === "iTXt") throw new Refused(`its EXIF is in a form that this page does not read; ${COPY_AGAIN}`);
  const text = new TextDecoder("latin1").decode(kind === "zTXt" ? await inflate(rest.subarray(1), 1e7) : rest);
  const digits = text.split("\n").slice(3).join("").replace(/\s/g, "");
  const bytes = Uint8Array.from(digits.match(/../g) ?? [], (pair) => parseInt(pair, 16));
  return isAt(bytes, 0, "Exif\0\0") ? bytes.subarray(6) : bytes;
}

// BMP without compression, by itself too

function decodeBmp(bytes) {
  const view = viewOf(bytes);
  if (bytes.length < 54) throw new Refused(`it ends too early; ${COPY_AGAIN}`);
  const [start, headed] = [view.getUint32(10, true), view.getUint32(14, true)];
  const [width, signed] = [view.getInt32(18, true), view.getInt32(22, true)];
  const [bits, packed] = [view.getUint16(28, true), view.getUint32(30, true)];
  if (headed < 40 || packed !== 0 || ![1, 4, 8, 24, 32].includes(bits)) {
    throw new Refused("a BMP of a rare kind; save it as PNG");
  }
  const height = Math.abs(signed);
  if (width < 1) throw new Refused(`it has no pixels; ${COPY_AGAIN}`);
  checkSize(width, height);
  const size = ((width * bits + 31) >> 5) << 2;
  if (start + size * height > bytes.length) throw new Refused(`it ends too early; ${COPY_AGAIN}`);
  const colours = 14 + headed;
  const data = new Uint8Array(3 * width * height);
  for (let y = 0, to = 0; y < height; y++) {
    const line = start + size * (signed < 0 ? y : height - 1 - y);
    for (let x = 0; x < width; x++, to += 3) {
      let from = line + (x * bits) / 8;
      if (bits < 24) {
        from = colours + 4 * packedSample(bytes, line, x, bits);
        if (from + 4 > start) throw new Refused(`its palette is too short; ${COPY_AGAIN}`);
      }
      for (let c = 0; c < 3; c++) data[to + c] = bytes[from + 2 - c];
    }
  }
  return { width, height, channels: 3, data, notes: [] };
}

// JPEG and WebP, by the browser. It gets neither colour profile nor orientation, so it cannot act on them.

async function decodeJpeg(bytes) {
  const kept = [bytes.subarray(0, 2)];
  let place = 2;
  let exif, xmp, size;
  for (let ended = false; !ended; ) {
    while (bytes[place] === 0xff && bytes[place + 1] === 0xff) place++;
    if (place + 2 > bytes.length) throw new Refused(`it ends too early; ${COPY_AGAIN}`);
    if (bytes[place] !== 0xff) throw new Refused(`it is damaged; ${COPY_AGAIN}`);
    const kind = bytes[place + 1];
    let end = place + 2;
    if (kind === 0xd9) ended = true;
    else if (kind !== 0x01) end += (bytes[place + 2] << 8) | bytes[place + 3];
    if (end > bytes.length || end < place + 2) throw new Refused(`it ends too early; ${COPY_AGAIN}`);
    const content = bytes.subarray(place + 4, end);
    if (kind >= 0xc0 && kind <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(kind)) {
      size = jpegSize(kind, content, bytes.length);
    } else if (kind === 0xda) {
      // the scan reaches to the next marker that is neither a restart nor a stuffed byte
      while (end < bytes.length && !(bytes[end] === 0xff && bytes[end + 1] && (bytes[end + 1] & 0xf8) !== 0xd0)) end++;
    }
    if (kind === 0xe1 && isAt(content, 0, "Exif\0\0")) exif ??= content.subarray(6);
    if (kind === 0xe1 && isAt(content, 0, "http://ns.adobe.com/xap/1.0/\0")) xmp = content;
    const metadata = kind === 0xfe || (kind > 0xe0 && kind <= 0xef && kind !== 0xee);
    if (!metadata) kept.push(bytes.subarray(place, end));
    place = end;
  }
  if (!size) throw new Refused(`it holds no picture; ${COPY_AGAIN}`);
  return upright(await byBrowser(joined(kept), "image/jpeg", ...size), orientationOf(exif, xmp));
}

function jpegSize(kind, frame, length) {
  const [height, width] = [(frame[1] << 8) | frame[2], (frame[3] << 8) | frame[4]];
  if (frame[0] !== 8 || kind > 0xc2) throw new Refused("a JPEG of a rare kind; save it as PNG");
  if (frame[5] === 4) throw new Refused("printing colours (CMYK); save it as PNG with red, green and blue");
  checkSize(width, height);
  // a block of 8 × 8 pixels takes two bits at least, one where it is progressive
  const blocks = Math.ceil(height / 8) * Math.ceil(width / 8);
  if (blocks * (kind === 0xc2 ? 1 : 2) > 8 * length) {
    throw new Refused(`its header claims ${width} × ${height} pixels, it holds fewer; ${COPY_AGAIN}`);
  }
  return [width, height];
}

async function decodeWebp(bytes) {
  const view = viewOf(bytes);
  const parts = [];
  let exif, xmp, size;
  const whole = 8 + view.getUint32(4, true);
  if (whole > bytes.length) throw new Refused(`it ends too early; ${COPY_AGAIN}`);
  for (let place = 12; place + 8 <= whole; ) {
    const kind = ascii(bytes, place, 4);
    const length = view.getUint32(place + 4, true);
    const end = place + 8 + length + (length & 1);
    if (place + 8 + length > whole) throw new Refused(`it ends too early; ${COPY_AGAIN}`);
    const content = bytes.subarray(place + 8, place + 8 + length);
    if (kind === "EXIF") exif = isAt(content, 0, "Exif\0\0") ? content.subarray(6) : content;
    else if (kind === "XMP ") xmp = content;
    else if (kind !== "ICCP") {
      const chunk = bytes.slice(place, end);
      if (kind === "VP8X") {
        if (chunk[8] & 0x02) throw new Refused("it holds several pictures; save each in a file of its own");
        chunk[8] &= 0x10;
        size = [12, 15].map((from) => 1 + (chunk[from] | (chunk[from + 1] << 8) | (chunk[from + 2] << 16)));
      } else if (kind === "VP8L") {
        const number = viewOf(content).getUint32(1, true);
        size ??= [1 + (number & 0x3fff), 1 + ((number >> 14) & 0x3fff)];
      } else if (kind === "VP8 ") {
        size ??= [(content[6] | (content[7] << 8)) & 0x3fff, (content[8] | (content[9] << 8)) & 0x3fff];
      }
      parts.push(chunk);
    }
    place = end;
  }
  if (!size) throw new Refused(`it holds no picture; ${COPY_AGAIN}`);
  checkSize(...size);
  const content = joined(parts);
  const head = bytes.slice(0, 12);
  viewOf(head).setUint32(4, content.length + 4, true);
  return upright(await byBrowser(joined([head, content]), "image/webp", ...size), orientationOf(exif, xmp));
}

async function byBrowser(bytes, type, width, height) {
  await checkCanvas();
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(new Blob([bytes], { type }), options).catch(() => {
    throw new Refused(`not a picture that this browser reads; ${COPY_AGAIN}`);
  });
  if (bitmap.width !== width || bitmap.height !== height) throw new Refused(`it is damaged; ${COPY_AGAIN}`);
  const pixels = readBack(width, height, (context) => context.drawImage(bitmap, 0, 0));
  bitmap.close();
  const data = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; to < data.length; from += 4) {
    if (pixels[from + 3] !== 255) throw new Refused("parts of it are transparent; save it as PNG");
    data[to++] = pixels[from];
    data[to++] = pixels[from + 1];
    data[to++] = pixels[from + 2];
  }
  return { width, height, channels: 3, data, notes: [] };
}

function readBack(width, height, draw) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  draw(context);
  return context.getImageData(0, 0, width, height).data;
}

let canvasIsExact;

/** Some browsers add noise to pixels that a page reads. */
async function checkCanvas() {
  if (canvasIsExact === undefined) {
    const drawn = Uint8ClampedArray.from({ length: 4 * 64 * 64 }, (_, i) => (i % 4 === 3 ? 255 : (i * 37) % 251));
    const found = readBack(64, 64, (context) => context.putImageData(new ImageData(drawn, 64, 64), 0, 0));
    canvasIsExact = drawn.every((value, i) => found[i] === value);
  }
  if (!canvasIsExact) throw new Refused("this browser changes the pixels that pages read; save it as PNG");
}

// Which kind a file is, its content says

const OTHERS = [
  [(bytes) => isAt(bytes, 128, "DICM"), "DICOM"],
  [(bytes) => isAt(bytes, 0, "II*\0") || isAt(bytes, 0, "MM\0*"), "TIFF"],
  [(bytes) => isAt(bytes, 0, "GIF8"), "GIF"],
  [(bytes) => isAt(bytes, 4, "ftyp"), "HEIC, AVIF or a film"],
  [(bytes) => isAt(bytes, 0, "%PDF"), "PDF"],
  [(bytes) => isAt(bytes, 0, "\x1f\x8b"), "a packed file"],
];

async function decode(file) {
  const bytes = new Uint8Array(
    await file.arrayBuffer().catch(() => {
      throw new Refused("it cannot be read: a folder, or a file that has been moved or changed; choose it again");
    }),
  );
  if (!bytes.length) throw new Refused("it is empty");
  if (isAt(bytes, 0, "\x89PNG\r\n\x1a\n")) return decodePng(bytes);
  if (isAt(bytes, 0, "\xff\xd8")) return decodeJpeg(bytes);
  if (isAt(bytes, 0, "RIFF") && isAt(bytes, 8, "WEBP")) return decodeWebp(bytes);
  if (isAt(bytes, 0, "BM")) return decodeBmp(bytes);
  const kind = OTHERS.find(([is]) => is(bytes))?.[1];
  throw new Refused(kind ? `${kind}, which this page does not read; save it as PNG` : "no PNG, JPEG, WebP or BMP");
}

// From a picture to the network's input. Images are { width, height, channels, data }, planes one after the other;
// `table` says what the bytes of data stand for, where they are not meant as they are.

const single = Math.fround;

function planes({ width, height, channels, data }, mode) {
  const wanted = mode === "L" ? 1 : 3;
  const count = width * height;
  const out = new Uint8Array(wanted * count);
  const order = mode === "BGR" ? [2, 1, 0] : [0, 1, 2];
  if (wanted === 3) {
    for (let c = 0; c < 3; c++) {
      const source = channels === 1 ? 0 : order[c];
      for (let i = 0; i < count; i++) out[c * count + i] = data[i * channels + source];
    }
  } else if (channels === 1) out.set(data);
  else {
    for (let i = 0, from = 0; i < count; i++, from += 3) {
      out[i] = (19595 * data[from] + 38470 * data[from + 1] + 7471 * data[from + 2] + 0x8000) >> 16;
    }
  }
  return { width, height, channels: wanted, data: out };
}

/** Where samples are taken: pixel centres, rounded to single precision where PyTorch does. */
function samples(from, to) {
  const scale = single(from / to);
  const [first, second, weight] = [new Int32Array(to), new Int32Array(to), new Float32Array(to)];
  for (let i = 0; i < to; i++) {
    const at = Math.max(0, single(scale * (i + 0.5) - 0.5));
    first[i] = Math.min(Math.floor(at), from - 1);
    second[i] = Math.min(first[i] + 1, from - 1);
    weight[i] = Math.min(single(at - first[i]), 1);
  }
  return { first, second, weight };
}

/** A function that gives a row of the image resized bilinearly, the channels one after the other. */
function resizedRows({ width, height, channels, data, table }, rows, columns) {
  const [x, y] = [samples(width, columns), samples(height, rows)];
  const out = new Float32Array(channels * columns);
  const value = table ? (i) => table[data[i]] : (i) => data[i];
  return (row) => {
    const down = y.weight[row];
    for (let c = 0, to = 0; c < channels; c++) {
      const above = (c * height + y.first[row]) * width;
      const below = (c * height + y.second[row]) * width;
      for (let column = 0; column < columns; column++) {
        const [left, right, across] = [x.first[column], x.second[column], x.weight[column]];
        const before = single(1 - across);
        const upper = single(value(above + left) * before + single(value(above + right) * across));
        const lower = single(value(below + left) * before + single(value(below + right) * across));
        out[to++] = upper * single(1 - down) + single(lower * down);
      }
    }
    return out;
  };
}

function resized(image, rows, columns) {
  const row = resizedRows(image, rows, columns);
  const data = new Float32Array(image.channels * rows * columns);
  for (let y = 0; y < rows; y++) {
    const values = row(y);
    for (let c = 0; c < image.channels; c++) {
      data.set(values.subarray(c * columns, (c + 1) * columns), (c * rows + y) * columns);
    }
  }
  return { width: columns, height: rows, channels: image.channels, data };
}

function halfToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}

const STEPS = {
  resize: (image, { size: [rows, columns] }) => resized(image, rows, columns),
  round: (image) => ({ ...image, data: image.data.map(halfToEven) }),
  normalise(image, { mean, std }) {
    const data = Float32Array.from(image.data);
    const count = data.length / image.channels;
    const of = (numbers, c) => single(Array.isArray(numbers) ? numbers[c] : numbers);
    for (let i = 0; i < data.length; i++) {
      const c = Math.floor(i / count);
      data[i] = single(data[i] - of(mean, c)) / of(std, c);
    }
    return { ...image, data };
  },
  stretch(image, { to: [low, high] }) {
    let [least, greatest] = [Infinity, -Infinity];
    for (const value of image.data) {
      if (value < least) least = value;
      if (value > greatest) greatest = value;
    }
    const range = greatest - least;
    const stretched = (value) => (range ? single(single(single(value - least) / range) * single(high - low)) + low
      : value * low);
    if (image.data instanceof Uint8Array) {
      return { ...image, table: Float32Array.from({ length: 256 }, (_, value) => stretched(value)) };
    }
    return { ...image, data: image.data.map(stretched) };
  },
};

function networkInput(picture, steps) {
  let image = picture;
  for (const step of steps) image = step.step === "read" ? planes(image, step.mode) : STEPS[step.step](image, step);
  const meant = image.table ? (value) => image.table[value] : (value) => value;
  const data = Float32Array.from(image.data, meant);
  return { ...image, data };
}

// From logits to the class of every pixel of the picture

function activated(logits, channels, coding) {
  const out = new Float32Array(logits.length);
  if (coding === "sigmoid") return out.map((_, i) => 1 / (1 + Math.exp(-logits[i])));
  const count = logits.length / channels;
  for (let i = 0; i < count; i++) {
    let [greatest, sum] = [-Infinity, 0];
    for (let c = 0; c < channels; c++) greatest = Math.max(greatest, logits[c * count + i]);
    for (let c = 0; c < channels; c++) sum += out[c * count + i] = Math.exp(logits[c * count + i] - greatest);
    for (let c = 0; c < channels; c++) out[c * count + i] /= sum;
  }
  return out;
}

/** The class of every pixel of a picture of that size. */
function classesOf(logits, [channels, height, width], size, coding) {
  const image = { width, height, channels, data: activated(logits, channels, coding) };
  const row = resizedRows(image, size.height, size.width);
  const classes = new Uint8Array(size.width * size.height);
  for (let y = 0, to = 0; y < size.height; y++) {
    const values = row(y);
    for (let x = 0; x < size.width; x++) {
      let best = 0;
      if (channels === 1) best = values[x] > 0.5 ? 1 : 0;
      for (let c = 1; c < channels; c++) if (values[c * size.width + x] > values[best * size.width + x]) best = c;
      classes[to++] = best;
    }
  }
  return classes;
}

/** A grey PNG whose pixels are the numbers that stand for the classes. */
async function encodePng({ width, height }, classes, numbers) {
  const deep = Math.max(...numbers) > 255 ? 2 : 1;
  const lines = new Uint8Array(height * (1 + width * deep));
  for (let y = 0, from = 0, to = 0; y < height; y++) {
    to++;
    for (let x = 0; x < width; x++) {
      const number = numbers[classes[from++]];
      if (deep === 2) lines[to++] = number >> 8;
      lines[to++] = number & 255;
    }
  }
  const header = new Uint8Array(13);
  viewOf(header).setUint32(0, width);
  viewOf(header).setUint32(4, height);
  header[8] = 8 * deep;
  const chunks = [["IHDR", header], ["IDAT", await deflate(lines)], ["IEND", new Uint8Array(0)]];
  const parts = [Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a)];
  for (const [kind, content] of chunks) {
    const [length, name, sum] = [new Uint8Array(4), new TextEncoder().encode(kind), new Uint8Array(4)];
    viewOf(length).setUint32(0, content.length);
    viewOf(sum).setUint32(0, crc32(name, content));
    parts.push(length, name, content, sum);
  }
  return new Blob(parts, { type: "image/png" });
}

/** A ZIP archive, nothing packed, of [name, content] in UTF-8. */
function zip(files) {
  const [parts, directory] = [[], []];
  let place = 0;
  for (const [name, content] of files) {
    const letters = new TextEncoder().encode(name);
    // version, flags (UTF-8), method, time and date (1 January 1980), checksum, both sizes, length of the name
    const about = new Uint8Array(26);
    const view = viewOf(about);
    view.setUint16(0, 20, true);
    view.setUint16(2, 0x0800, true);
    view.setUint16(8, 33, true);
    view.setUint32(10, crc32(content), true);
    view.setUint32(14, content.length, true);
    view.setUint32(18, content.length, true);
    view.setUint16(22, letters.length, true);
    const where = new Uint8Array(14);
    viewOf(where).setUint32(10, place, true);
    const local = [Uint8Array.of(0x50, 0x4b, 3, 4), about, letters, content];
    directory.push(Uint8Array.of(0x50, 0x4b, 1, 2, 20, 0), about, where, letters);
    parts.push(...local);
    place += local.reduce((sum, part) => sum + part.length, 0);
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = new Uint8Array(22);
  end.set([0x50, 0x4b, 5, 6]);
  const view = viewOf(end);
  view.setUint16(8, files.length, true);
  view.setUint16(10, files.length, true);
  view.setUint32(12, size, true);
  view.setUint32(16, place, true);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

// What the page asks for

const SHOWN = 1600;
let ort, session, description;

const TASKS = {
  async start({ program, wasm, model, about }) {
    description = about;
    ort = await import(URL.createObjectURL(new Blob([program], { type: "text/javascript" })));
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = wasm;
    session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  },

  /** Size, pixels of each class, the mask as PNG, and the classes packed. */
  async segment({ file }) {
    const picture = await decode(file);
    const { channels, height, width, data } = networkInput(picture, description.input.steps);
    const input = new ort.Tensor("float32", data, [1, channels, height, width]);
    const { [session.outputNames[0]]: output } = await session.run({ [session.inputNames[0]]: input });
    const { classes: names, coding, stored } = description.output;
    const classes = classesOf(output.data, output.dims.slice(1), picture, coding);
    output.dispose();
    const counts = new Array(names.length).fill(0);
    for (const index of classes) counts[index]++;
    const numbers = names.map((name) => stored[name]);
    const mask = await encodePng(picture, classes, numbers);
    const { width: across, height: down, notes } = picture;
    return { width: across, height: down, notes, counts, mask, packed: await deflate(classes) };
  },

  /** An archive of files, [name, Blob]. */
  async archive({ files }) {
    const contents = files.map(async ([name, blob]) => [name, new Uint8Array(await blob.arrayBuffer())]);
    return zip(await Promise.all(contents));
  },

  /** Picture and classes for the screen, made smaller where they are large. */
  async show({ file, packed }) {
    const [picture, drawn] = [await decode(file), await inflate(packed)];
    const step = Math.ceil(Math.max(picture.width, picture.height) / SHOWN);
    const [width, height] = [Math.ceil(picture.width / step), Math.ceil(picture.height / step)];
    const [pixels, classes] = [new Uint8ClampedArray(4 * width * height), new Uint8Array(width * height)];
    for (let y = 0, to = 0; y < height; y++) {
      for (let x = 0; x < width; x++, to++) {
        const from = Math.min(y * step + (step >> 1), picture.height - 1) * picture.width
          + Math.min(x * step + (step >> 1), picture.width - 1);
        classes[to] = drawn[from];
        for (let c = 0; c < 3; c++) pixels[4 * to + c] = picture.data[from * picture.channels + (c % picture.channels)];
        pixels[4 * to + 3] = 255;
      }
    }
    return { width, height, pixels, classes };
  },
};

addEventListener("message", async ({ data: { id, task, content } }) => {
  try {
    postMessage({ id, answer: await TASKS[task](content) });
  } catch (error) {
    const line = error instanceof Refused ? error.message : `this browser cannot do it (${error?.message ?? error})`;
    postMessage({ id, error: line });
  }
});
