// Numbers as people read them. "–" stands for a number that there is not.

const NONE = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);
const short = (value) => String(Number(value.toPrecision(3)));
const whole = new Intl.NumberFormat("en");

export const count = (value) => (known(value) ? whole.format(Math.round(value)) : NONE);

export function bytes(value) {
  if (!known(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (Math.abs(value) >= 1000 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${short(value)} ${units[power]}`;
}

export function seconds(value) {
  if (!known(value)) return NONE;
  return value < 0.9995 ? `${short(value * 1000)} ms` : `${short(value)} s`;
}

export const times = (value) => (known(value) && value > 0 ? `${value.toFixed(2)}×` : NONE);
/** A number without a unit, in at most three digits or whole. */
export const plain = (value) => (known(value) ? (Math.abs(value) < 100 ? short(value) : count(value)) : NONE);
export const rate = (value) => (known(value) ? `${value < 99.95 ? value.toFixed(1) : count(value)} tok/s` : NONE);
export const percent = (value) => (known(value) ? `${(value * 100).toFixed(1)} %` : NONE);

export function duration(value) {
  if (!known(value)) return NONE;
  const [day, hour, minute] = [86400, 3600, 60];
  if (value >= day) return `${Math.floor(value / day)} d ${Math.floor((value % day) / hour)} h`;
  if (value >= hour) return `${Math.floor(value / hour)} h ${Math.floor((value % hour) / minute)} min`;
  if (value >= minute) return `${Math.floor(value / minute)} min ${Math.floor(value % minute)} s`;
  return `${Math.floor(value)} s`;
}

/** `text` with a capital letter and an end, as reasons and error messages may lack both. */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
