// Axes: values to pixels and back, and tick positions.

// Smallest and largest value of several lists; null if none can be drawn.
export function findRange(lists, isLog) {
  let [low, high] = [Infinity, -Infinity];
  for (const list of lists) {
    for (const value of list) {
      if (!Number.isFinite(value) || (isLog && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return null;
  if (isLog) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - margin < 0 ? 0 : low - margin, high + margin];
}

// value -> fraction of the way from `low` to `high`; NaN if the logarithm is undefined.
export function createScale([low, high], isLog) {
  if (!isLog) return (value) => (value - low) / (high - low);
  const [start, length] = [Math.log(low), Math.log(high) - Math.log(low)];
  return (value) => (value > 0 ? (Math.log(value) - start) / length : NaN);
}

// About `count` round numbers inside the range.
export function listTicks([low, high], isLog, count) {
  if (isLog) {
    const marks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const factor of [1, 2, 5]) marks.push(factor * 10 ** power);
    }
    const inside = marks.filter((mark) => mark >= low && mark <= high);
    const every = Math.ceil(inside.length / (count + 1)) || 1;
    return inside.filter((_, i) => i % every === 0);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough) ?? 10 * power;
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(i * step);
  return ticks;
}

// Index of the value nearest to `step` in an ascending list.
export function findNearest(steps, step) {
  let [left, right] = [0, steps.length - 1];
  while (left < right) {
    const middle = (left + right) >> 1;
    if (steps[middle] < step) left = middle + 1;
    else right = middle;
  }
  return left > 0 && step - steps[left - 1] < steps[left] - step ? left - 1 : left;
}
