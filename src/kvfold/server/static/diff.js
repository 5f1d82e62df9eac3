// Where two growing texts part.

// Letters of scripts that part words by spaces; in the others each character stands for itself.
const WORD = /(?![\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Thai}])[\p{L}\p{N}\p{M}_'’-]/u;

/** The length of the longest common beginning of `a` and `b`, never inside a surrogate pair. */
export function commonLength(a, b) {
  const limit = Math.min(a.length, b.length);
  let length = 0;
  while (length < limit && a[length] === b[length]) length += 1;
  const before = a.charCodeAt(length - 1);
  return length > 0 && before >= 0xd800 && before < 0xdc00 ? length - 1 : length;
}

/**
 * The first place where `a` and `b` differ, or null while none is known: a text that is merely ahead of the other
 * differs only once the shorter one `isDone`. `at` is the first differing index; `start` is where the word around it
 * begins, so that a whole word is marked, not its last letter.
 */
export function parting(a, b, aDone, bDone) {
  const at = commonLength(a, b);
  const sure = (at < a.length && at < b.length) || (at < a.length && bDone) || (at < b.length && aDone);
  if (!sure) return null;
  if (at === a.length || at === b.length) return { at, start: at };
  let start = at;
  while (start > 0 && at - start < 24 && WORD.test(a[start - 1])) start -= 1;
  // One endless word: mark the place itself.
  return { at, start: at - start < 24 ? start : at };
}

/** `text` cut at `start` into what is common, the word to mark (with the space before it, if any) and the rest. */
export function cut(text, start) {
  let end = start;
  while (end < text.length && /\s/.test(text[end])) end += 1;
  const letters = end;
  while (end < text.length && end - letters < 40 && WORD.test(text[end])) end += 1;
  if (end === letters && end < text.length) end += text.codePointAt(end) > 0xffff ? 2 : 1;
  return [text.slice(0, start), text.slice(start, end), text.slice(end)];
}
