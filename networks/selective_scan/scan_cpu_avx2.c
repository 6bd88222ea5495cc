/* The scan with AVX2 and FMA: vectors of eight. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define VL 8
#define NB 8
#include "scan_cpu_forward.h"
#include "scan_cpu_backward.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
