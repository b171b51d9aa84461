// Which instruction sets this compiler can build.
#pragma once

#if defined(__x86_64__)
#define CONVLLAVA_X86 1
// GCC before 11 does not know VNNI without AVX-512, Clang before 18 cannot ask for it.
#if defined(__clang__) ? __clang_major__ >= 18 : __GNUC__ >= 11
#define CONVLLAVA_AVX_VNNI 1
#endif
#endif
