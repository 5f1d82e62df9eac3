#include "format.h"

#include <algorithm>

namespace kvfold {
namespace {

// Keys are multiplied four dimensions of one token at a time: byte 4 t + i of the register is token t of dimension i.
void interleave_keys(Quad& quad, const Row& row) {
    for (int byte = 0; byte < 64; ++byte) {
        const int lane = byte / 8, i = byte % 4, token = byte / 4;
        // A lane holds two tokens; two bytes of each dimension contain both of its codes.
        for (int half = 0; half < 2; ++half) {
            const bool there = i < quad.dims;
            const int width = there ? row.widths[quad.dim + i] : 8;
            const int start = there ? row.offsets[quad.dim + i] - quad.offset : 0;
            quad.index[8 * lane + 2 * i + half] = uint8_t(std::min(63, start + 2 * lane * width / 8 + half));
        }
        const int width = i < quad.dims ? row.widths[quad.dim + i] : 8;
        quad.shift[byte] = uint8_t(16 * i + 2 * lane * width % 8 + (token % 2) * width);
        quad.mask[byte] = i < quad.dims ? uint8_t((1 << width) - 1) : 0;
    }
}

// Values are multiplied four tokens of one dimension at a time: byte 16 i + t is token t of dimension i.
void interleave_values(Quad& quad, const Row& row) {
    for (int byte = 0; byte < 64; ++byte) {
        const int i = byte / 16, half = byte % 16 / 8, token = byte % 8;
        const int width = i < quad.dims ? row.widths[quad.dim + i] : 1;
        const int start = i < quad.dims ? row.offsets[quad.dim + i] - quad.offset : 0;
        quad.index[byte] = uint8_t(std::min(63, start + half * width + token));
        quad.shift[byte] = uint8_t(token * width);
        quad.mask[byte] = i < quad.dims ? uint8_t((1 << width) - 1) : 0;
        quad.flip[byte] = width == 8 ? 0x80 : 0;
    }
}

Row make_row(const int32_t*& words, int block, bool key) {
    Row row;
    row.scale = Scale(*words++);
    row.groups = *words++;
    row.sums = *words++ != 0;
    row.kept = *words++;
    row.unit = std::min(block, kUnit);
    const int sharing = std::max(1, row.kept / row.groups);
    for (int i = 0; i < row.kept; ++i) {
        const int bits = *words++;
        if (i % sharing == 0 || bits != row.widths.back()) row.parts.push_back(i);
        row.raw += bits >= 16;
        if (bits >= 16) row.raw_bits = bits;
        row.widths.push_back(uint8_t(bits));
        row.offsets.push_back(row.unit_bytes);
        row.centre.push_back(bits < 16 ? float((1 << bits) - 1) / 2 : 0.f);
        row.bits += bits < 16 ? bits : 0;
        row.unit_bytes += bits * row.unit / 8;
    }
    row.parts.push_back(row.kept);
    row.scales = row.unit_bytes * block / row.unit;
    if (block < kUnit || !row.kept) {
        row.fast = !row.kept || (block == 1 && !row.coded() && row.raw_bits == 16);
        row.spans.assign(2, 0);
        return row;
    }
    const bool grouped = row.scale == Scale::Token && row.groups > 1;
    const int size = grouped ? row.kept / row.groups : std::max(1, row.coded());
    // Keys of seven bits have their two codes spread over three bytes.
    const bool sevens = std::find(row.widths.begin(), row.widths.end(), 7) != row.widths.end();
    row.fast = row.raw_bits == 16 && (key ? !sevens : row.scale != Scale::Channel);
    row.spans.push_back(0);
    for (int start = row.raw; start < row.kept; start += size) {
        for (int dim = start; dim < start + size; dim += 4) {
            Quad quad{};
            quad.offset = row.offsets[dim];
            quad.dim = dim;
            quad.dims = std::min(4, start + size - dim);
            for (int d = dim; d < dim + quad.dims; ++d) {
                quad.bytes += row.widths[d] * row.unit / 8;
                quad.noise += float(1 << 2 * row.widths[d]) / (12 * 12);  // of a product of two numbers of even distribution
            }
            (key ? interleave_keys : interleave_values)(quad, row);
            row.quads.push_back(quad);
        }
        row.spans.push_back(int(row.quads.size()));
    }
    if (row.spans.size() == 1) row.spans.push_back(0);
    return row;
}

// Whether blocks of few tokens have one byte of codes for each dimension, and scales by token, if any.
bool bytewise(const Row& row, int block) {
    const bool scales = row.scale == Scale::Static || row.scale == Scale::Step;
    return scales && std::all_of(row.widths.begin(), row.widths.end(), [&](int bits) { return bits * block == 8; });
}

}  // namespace

int Row::nbytes(int block) const {
    const int per_scale[] = {0, 4 + 2 * sums, 4 + 2 * sums, 1};
    const int count = !kept                      ? 0
                      : scale == Scale::Token    ? block * groups
                      : scale == Scale::Channel  ? kept
                      : scale == Scale::Step     ? block
                                                 : 0;
    return scales + per_scale[int(scale)] * count;
}

Format make_format(const int32_t* words) {
    const int32_t* const begin = words;
    Format fmt{};
    fmt.page_bytes = *words++;
    fmt.head_dim = *words++;
    fmt.block = *words++;
    fmt.key = make_row(words, fmt.block, true);
    fmt.value = make_row(words, fmt.block, false);
    fmt.key_bytes = fmt.key.nbytes(fmt.block);
    fmt.block_bytes = fmt.key_bytes + fmt.value.nbytes(fmt.block);
    fmt.capacity = fmt.page_bytes / fmt.block_bytes * fmt.block;
    if (fmt.block < kUnit && bytewise(fmt.key, fmt.block) && bytewise(fmt.value, fmt.block)) {
        std::vector<int32_t> same(begin, words);
        same[2] = kRegrouped;
        fmt.regrouped = std::make_shared<const Format>(make_format(same.data()));
    }
    return fmt;
}

}  // namespace kvfold
