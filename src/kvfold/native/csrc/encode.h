#pragma once
#include "format.h"

namespace kvfold {

// keys, values: [block][head_dim]; out: block_bytes.
void encode_block(const Format& fmt, const float* keys, const float* values, uint8_t* out);

}  // namespace kvfold
