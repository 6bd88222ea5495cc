/* The selective scan and its gradients for CPUs: run-time choice of the instruction set, tasks and
 * threads. No PyTorch, no Python: cpu.py loads this library with ctypes.
 *
 * scan_cpu_vectors.h, _task.h, _forward.h and _backward.h, in this order of reading, hold the
 * arithmetic. scan_cpu_baseline.c, _avx2.c and _avx512.c compile them for one instruction set each.
 */
#include "scan_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

EXPORT const int64_t scan_chunk = CHUNK;
EXPORT const int64_t scan_struct_size = sizeof(struct scan);

/* The best level that this processor has. */
EXPORT int64_t scan_best_level(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

typedef int (*task_function)(const struct scan *, int64_t);

/* States decay towards zero, and subnormal numbers are slow: while a task runs they count as zero,
 * as results (bit 15, FTZ) and as operands (bit 6, DAZ). */
static int run_task(task_function task, const struct scan *s, int64_t index)
{
#if defined(__x86_64__)
    unsigned int saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040);
    int failed = task(s, index);
    _mm_setcsr(saved);
    return failed;
#else
    return task(s, index);
#endif
}

/* Each task owns its results, so that a fixed number of threads gives the same bits every time.
 * Returns 0, or 1 when memory ran out. */
EXPORT int scan_run(const struct scan *s, int backward, int threads)
{
    static const task_function forward_functions[] = {
        forward_baseline,
#if defined(__x86_64__)
        forward_avx2,
        forward_avx512,
#endif
    };
    static const task_function backward_functions[] = {
        backward_baseline,
#if defined(__x86_64__)
        backward_avx2,
        backward_avx512,
#endif
    };
    task_function task = backward ? backward_functions[s->level] : forward_functions[s->level];
    int64_t tasks = s->item_groups * s->segments;
    int failed = 0;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)                                  \
    reduction(| : failed) if (tasks > 1 && threads > 1)
#endif
    for (int64_t index = 0; index < tasks; index++)
        failed |= run_task(task, s, index);
    (void)threads;
    return failed;
}
