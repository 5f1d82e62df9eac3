// What one page holds: the mirror of kvfold.kv.format, made from it once per distinct format.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace kvfold {

constexpr int kUnit = 16;         // tokens whose codes lie together, or all of a smaller block
constexpr int kRegrouped = 256;   // tokens that small blocks are put together to at once
constexpr int kStepsPerOctave = 12;  // of a logarithmic step

enum class Scale : int { Static, Token, Channel, Step };

// Four dimensions of a unit: where their bytes begin and how 64 of them become 64 codes.
struct alignas(64) Quad {
    uint8_t index[64];   // byte of the window that each byte of a register comes from
    uint8_t shift[64];   // first bit of each code in its 64-bit lane
    uint8_t mask[64];
    uint8_t flip[64];    // of values: makes codes of eight bits signed numbers, 128 lower
    int32_t offset;      // of the window in the unit
    int32_t dim, dims;   // the first dimension, and how many there are: a group may end before the fourth
    int32_t bytes;       // of its codes in the unit
    float noise;         // squared error of a score for one of the queries' roundings
};

struct Row {
    int kept = 0, raw = 0, raw_bits = 16;
    int bits = 0;                   // of all codes of a token
    Scale scale = Scale::Static;
    int groups = 1;                 // token scales: groups of dimensions
    bool sums = false;              // of the codes that share a scale are stored behind the scales: nobody here reads them
    std::vector<uint8_t> widths;    // bits of every kept dimension
    std::vector<int32_t> offsets;   // bytes before it in a unit
    std::vector<float> centre;      // what a static or logarithmic code is counted from
    int unit = kUnit;               // tokens of one unit
    int unit_bytes = 0;             // codes of one unit
    int scales = 0;                 // byte offset of the scales from the start of the row's part of a block
    std::vector<Quad> quads;        // coded dimensions, four at a time; a group begins a new one
    std::vector<int32_t> parts;     // dimensions [parts[i], parts[i + 1]) have one width and are of one group
    std::vector<int32_t> spans;     // quads [spans[i], spans[i + 1]) share their scales
    bool fast = false;              // whether the vector kernels take it

    int coded() const { return kept - raw; }
    int nbytes(int block) const;
    // Whether codes are so precise that rounding what they are multiplied with to one byte would show.
    bool fine() const { return bits > 6 * coded(); }
};

struct Format {
    int page_bytes, head_dim, block, capacity, key_bytes, block_bytes;
    Row key, value;
    std::shared_ptr<const Format> regrouped;  // small blocks as the vector kernels take them, if they do
    bool raw() const { return block == 1 && !key.coded() && !value.coded(); }
};

// `words`: page_bytes, head_dim, block, then key and value as (scale, groups, sums, kept, widths...).
Format make_format(const int32_t* words);

}  // namespace kvfold
