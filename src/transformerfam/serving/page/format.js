// Numbers and names as the page writes them.

const UNITS = ["B", "kB", "MB", "GB", "TB"];
const WHOLE = new Intl.NumberFormat("en");

export const whole = (number) => WHOLE.format(Math.round(number));

export function bytes(number) {
  let unit = 0;
  while (number >= 999.5 && unit < UNITS.length - 1) {
    number /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || number >= 99.95 ? 0 : number >= 9.995 ? 1 : 2;
  return `${number.toFixed(digits)}\u00a0${UNITS[unit]}`;
}

// As on an axis: 50 MB, where a measured size would be 50.0 MB.
export const roundBytes = (number) => bytes(number).replace(/\.0+(?=\D)/, "");

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}\u00a0%`;

export const plural = (number, word) => `${whole(number)}\u00a0${word}${number === 1 ? "" : "s"}`;

export const nameOf = (memory) => memory.name || `untitled ${memory.id.slice(-6)}`;

// The smallest of 1, 2, 5, 10, 20, 50, ... that is not below a number.
export function niceAbove(number) {
  const power = 10 ** Math.floor(Math.log10(Math.max(number, 1)));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= number);
}
