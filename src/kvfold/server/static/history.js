// The readings of /stats over the last minutes, and what follows from two of them.

const SMOOTH = 3; // readings between which a rate is taken: single seconds are too jumpy to read

export class History {
  readings = []; // [{ time (s), stats, rates: { generated, prompt } }], oldest first

  constructor(span) {
    this.span = span;
  }

  /** Add the reading `stats` of `time` in seconds. */
  add(time, stats) {
    const before = this.readings.at(-SMOOTH);
    const rates = { generated: null, prompt: null };
    // Totals that fall belong to a new engine, and a pause (hidden page) has no rate worth a point.
    if (before && time - before.time < 3 * SMOOTH) {
      for (const [name, total] of [
        ["generated", "generated_tokens"],
        ["prompt", "prompt_tokens"],
      ]) {
        const gain = stats[total] - before.stats[total];
        if (gain >= 0) rates[name] = gain / (time - before.time);
      }
    }
    this.readings.push({ time, stats, rates });
    while (this.readings[0].time < time - this.span) this.readings.shift();
  }

  /** Points for a chart: `values(reading)` gives an object of numbers. */
  points(values) {
    return this.readings.map((reading) => ({ time: reading.time, values: values(reading) }));
  }
}
