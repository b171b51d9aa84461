// Resizing and normalizing RGB images, for a caller through a C interface (runtime/image/resize.py). AVX2 is needed.
#pragma once

#include <cstdint>

#define CONVLLAVA_EXPORT extern "C" __attribute__((visibility("default")))

// The two passes of Pillow's Image.resize with its bicubic filter, bit for bit: its fixed-point arithmetic, and 8 bits
// between the passes. Return 0, or 1 where memory ran out.

// Rows of `width` pixels [rows, width, 3] to rows of `out_width` pixels.
CONVLLAVA_EXPORT int convllava_resize_rows(const uint8_t* pixels, int64_t rows, int64_t width, uint8_t* out,
                                           int64_t out_width);

// `height` rows of `row_bytes` bytes to `out_height` such rows.
CONVLLAVA_EXPORT int convllava_resize_columns(const uint8_t* pixels, int64_t height, int64_t row_bytes, uint8_t* out,
                                              int64_t out_height);

// out [3, count] = levels[channel][pixels [count, 3]], with levels [3, 256].
CONVLLAVA_EXPORT void convllava_normalize(const uint8_t* pixels, int64_t count, const float* levels, float* out);
