// Encoded rows to float32, in registers: the arithmetic of ekko/store/kernels/quantise.py, bit for bit, and for the same
// reason in whole numbers: the same bits come out whatever the processor does with numbers below the normal ones.
//
// A lane has one chunk of 16 bytes at a time. It decodes to quads, four neighbouring values each: one of a float32 row's
// chunk, two of a float16 or bfloat16 row's, four of an int8 row's. An int8 row begins with its scale, so its first quad of
// the first chunk is none, and each value stands one quad before where it would stand otherwise.
#pragma once
#include "bucket.cuh"

struct Quad {
    float value[4];
};

template <u32 CODEC> constexpr u32 QUADS = CODEC == EKKO_CODEC_FLOAT32 ? 1 : CODEC == EKKO_CODEC_INT8 ? 4 : 2;

// The row's index of a quad's first value; negative for the scale.
template <u32 CODEC> DEVICE i64 first_value(u32 chunk, u32 quad) {
    return 4 * (static_cast<i64>(chunk) * QUADS<CODEC> + quad) - (CODEC == EKKO_CODEC_INT8 ? 4 : 0);
}

DEVICE float half_value(u32 code) {
    constexpr u32 NORMAL_MIN = 0x38800000, REBIAS = 0x38000000, DECODED_NORMAL_MIN = 0x00800000;
    const u32 magnitude = (code & 0x7fff) << 13;
    const u32 subnormal = bits_of(float_of(magnitude + NORMAL_MIN) - float_of(NORMAL_MIN));
    const u32 chosen = magnitude < DECODED_NORMAL_MIN ? subnormal : magnitude + REBIAS;
    return float_of(chosen | (code & 0x8000) << 16);
}

DEVICE float bfloat_value(u32 code) { return float_of(code << 16); }

template <u32 CODEC> DEVICE Quad decode(const Chunk& chunk, u32 quad, float scale) {
    Quad made;
    UNROLL for (u32 i = 0; i < 4; ++i) {
        if constexpr (CODEC == EKKO_CODEC_FLOAT32) {
            made.value[i] = float_of(chunk.word[i]);
        } else if constexpr (CODEC == EKKO_CODEC_INT8) {
            made.value[i] = static_cast<float>(static_cast<signed char>(chunk.word[quad] >> (8 * i))) * scale;
        } else {
            const u32 code = chunk.word[2 * quad + i / 2] >> (16 * (i % 2)) & 0xffff;
            made.value[i] = CODEC == EKKO_CODEC_FLOAT16 ? half_value(code) : bfloat_value(code);
        }
    }
    return made;
}
