// Unpacks a deflate stream (RFC 1951) at once: the browser's own DecompressionStream would come after the page is printed.
function inflate(bytes, size) {
  const out = new Uint8Array(size);
  let at = 0, held = 0, known = 0, end = 0;
  function bits(number) {
    while (known < number) { held |= bytes[at++] << known; known += 8; }
    const value = held & ((1 << number) - 1);
    held >>>= number;
    known -= number;
    return value;
  }
  function tree(lengths) {  // canonical Huffman codes: how many there are of each length, and what they stand for
    const counts = new Uint16Array(16), places = new Uint16Array(17), symbols = new Uint16Array(lengths.length);
    for (const length of lengths) if (length) counts[length]++;
    for (let i = 1; i < 16; i++) places[i + 1] = places[i] + counts[i];
    lengths.forEach((length, i) => { if (length) symbols[places[length]++] = i; });
    return { counts, symbols };
  }
  function symbol({ counts, symbols }) {
    for (let code = 0, first = 0, place = 0, length = 1; ; length++) {
      code |= bits(1);
      if (code - first < counts[length]) return symbols[place + code - first];
      place += counts[length];
      first = (first + counts[length]) << 1;
      code <<= 1;
    }
  }
  function bases(extra, first) {  // the smallest number that each code stands for
    let sum = first;
    return extra.map(number => { const base = sum; sum += 1 << number; return base; });
  }
  const lengthBits = Array.from({ length: 28 }, (_, i) => Math.max(0, (i >> 2) - 1)).concat(0);
  const distanceBits = Array.from({ length: 30 }, (_, i) => Math.max(0, (i >> 1) - 1));
  const lengthBases = bases(lengthBits, 3), distanceBases = bases(distanceBits, 1);
  lengthBases[28] = 258;
  const fixed = [
    tree(Array.from({ length: 288 }, (_, i) => i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8)), tree(Array(30).fill(5)),
  ];
  function trees() {
    const literals = bits(5) + 257, distances = bits(5) + 1, number = bits(4) + 4, lengths = Array(19).fill(0);
    [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15].slice(0, number).forEach(i => { lengths[i] = bits(3); });
    const short = tree(lengths), all = [];
    while (all.length < literals + distances) {
      const what = symbol(short);
      if (what < 16) all.push(what);
      else if (what === 16) all.push(...Array(3 + bits(2)).fill(all[all.length - 1]));
      else all.push(...Array(what === 17 ? 3 + bits(3) : 11 + bits(7)).fill(0));
    }
    return [tree(all.slice(0, literals)), tree(all.slice(literals))];
  }
  for (let last = 0; !last;) {
    last = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      held = known = 0;
      const length = bytes[at] | bytes[at + 1] << 8;
      out.set(bytes.subarray(at + 4, at + 4 + length), end);
      at += 4 + length;
      end += length;
      continue;
    }
    const [literals, distances] = kind === 1 ? fixed : trees();
    for (let what = symbol(literals); what !== 256; what = symbol(literals)) {
      if (what < 256) { out[end++] = what; continue; }
      const length = lengthBases[what - 257] + bits(lengthBits[what - 257]), far = symbol(distances);
      const from = end - distanceBases[far] - bits(distanceBits[far]);
      for (let i = 0; i < length; i++) out[end++] = out[from + i];
    }
  }
  return out;
}
