// A long prompt to compare methods on: with a short one all tokens are recent, and recent ones stay in 16 bits.

const SHIPS = ["Marigold", "Northern Star", "Petrel", "Anna Lind", "Halcyon", "Cormorant", "Blue Heron"];
const PORTS = ["Bergen", "Lisbon", "Riga", "Genoa", "Cork"];
const CARGO = [
  "timber",
  "salt fish",
  "wool and hides",
  "copper wire",
  "oranges",
  "printing paper",
  "grain",
  "glass",
  "tea",
];
const ENTRIES = 30;

/** A harbour's log, always the same, and a question about it: about 800 tokens. */
export function longPrompt() {
  const entries = Array.from({ length: ENTRIES }, (_, index) => {
    const pick = (list, factor) => list[(index * factor) % list.length];
    const time = `${String(5 + (index % 14)).padStart(2, "0")}:${String((index * 17) % 60).padStart(2, "0")}`;
    return `Entry ${index + 1}. The ${pick(SHIPS, 3)} came in from ${pick(PORTS, 2)} at ${time} with ${pick(CARGO, 4)}.`;
  });
  return `This is a harbour's log.\n${entries.join("\n")}\nDescribe in a few sentences what this harbour trades in, and with whom.`;
}
