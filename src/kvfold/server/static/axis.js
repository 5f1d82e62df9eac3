// Round numbers for the axes of charts.

const DECIMAL = [1, 2, 2.5, 5, 10];
const BINARY = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];

/** The smallest step of a pleasant size that reaches `top` (above 0) in at most `most` steps. */
function step(top, most, { binary, integer }) {
  const base = binary ? 1024 : 10;
  const unit = base ** Math.floor(Math.log(top / most) / Math.log(base));
  const sizes = (binary ? BINARY : DECIMAL).map((factor) => factor * unit);
  return sizes.find((size) => size * most >= top && (!integer || Number.isInteger(size)));
}

/** Ticks from 0 to at least `top`. `binary`: powers of 1024 (bytes); `integer`: whole numbers only, `top` at least `most`. */
export function ticks(top, kind, most = 4) {
  const size = step(top, most, kind);
  const number = Math.ceil(top / size - 1e-9);
  return Array.from({ length: number + 1 }, (_, index) => index * size);
}
