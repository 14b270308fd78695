/* The loops for each set of instructions, of which one is chosen at run time, and threads. */

/* Without an instruction for it, a fused multiply-add is a call of a function: right, but slow. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__) || defined(_M_ARM64)
#define BASELINE_IS_FAST 1
#else
#define BASELINE_IS_FAST 0
#endif

/* Of elements one by one, the compiler is told that it may make vectors: an element is read before
 * it is written, and nobody reads another's. */
#if defined(__clang__)
#define ELEMENTS_ARE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ELEMENTS_ARE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define ELEMENTS_ARE_INDEPENDENT __pragma(loop(ivdep))
#endif

/* Leave a member as it is: out of place, to the bit. */
static void keep(const Job *job, int64_t leaf, int64_t begin, int64_t end)
{
    for (int column = 0; column < job->new_columns; column++) {
        const int64_t item = job->items[old_of(column)];
        const char *source = old_at(job, old_of(column), leaf) + begin * item;
        char *target = new_at(job, column, leaf) + begin * item;
        if (source != target)
            memcpy(target, source, (size_t)((end - begin) * item));
    }
}

#define JOIN_AS_THEY_ARE(one, other) one##_##other
#define JOIN(one, other) JOIN_AS_THEY_ARE(one, other)
#define fma_float fmaf
#define fma_double fma
#define sqrt_float sqrtf
#define sqrt_double sqrt

#define REAL float
#define FLOATS 1
#define INTEGER int32_t
#define WIDTH 1
#define OP(name) name##_float
#define NAME(name) float_baseline_##name
#include "_native_steps.h"
#define REAL double
#define FLOATS 0
#define INTEGER int64_t
#define WIDTH 1
#define OP(name) name##_double
#define NAME(name) double_baseline_##name
#include "_native_steps.h"

#if X86_TARGETS
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define REAL float
#define FLOATS 1
#define INTEGER int32_t
#define WIDTH 8
#define OP(name) _mm256_##name##_ps
#define WHOLE(name, one, other) _mm256_##name##_epi32((__m256i)(one), (__m256i)(other))
#define PRODUCT(words, number) \
    _mm256_mul_epu32((__m256i)(words), _mm256_set1_epi64x((int64_t)(number)))
#define WIDEN(source) \
    _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(source))), 16)
#define UPPER(bits) \
    _mm256_castsi256_si128(_mm256_permute4x64_epi64( \
        _mm256_packus_epi32(_mm256_srli_epi32((__m256i)(bits), 16), _mm256_setzero_si256()), 8))
#define NAME(name) float_avx2_##name
#include "_native_steps.h"
#define REAL double
#define FLOATS 0
#define INTEGER int64_t
#define WIDTH 4
#define OP(name) _mm256_##name##_pd
#define NAME(name) double_avx2_##name
#include "_native_steps.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define REAL float
#define FLOATS 1
#define INTEGER int32_t
#define WIDTH 16
#define OP(name) _mm512_##name##_ps
#define WHOLE(name, one, other) _mm512_##name##_epi32((__m512i)(one), (__m512i)(other))
#define PRODUCT(words, number) \
    _mm512_mul_epu32((__m512i)(words), _mm512_set1_epi64((int64_t)(number)))
#define WIDEN(source) \
    _mm512_maskz_permutexvar_epi16( \
        0xAAAAAAAA, (__m512i)to_upper_halves, \
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(source))))
#define UPPER(bits) \
    _mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)upper_halves, (__m512i)(bits)))
#define NAME(name) float_avx512_##name
#include "_native_steps.h"
#define REAL double
#define FLOATS 0
#define INTEGER int64_t
#define WIDTH 8
#define OP(name) _mm512_##name##_pd
#define NAME(name) double_avx512_##name
#include "_native_steps.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
/* The sets of instructions, best first. */

typedef void (*Range)(const Job *, int64_t, int64_t, int64_t);

#if X86_TARGETS
static int has_avx512(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
}

static int has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

static int has_always(void)
{
    return 1;
}

static const struct {
    const char *name;
    Range float_range, double_range;
    int (*is_there)(void);
    int is_fast;
} instruction_sets[] = {
#if X86_TARGETS
    {"avx512", float_avx512_range, double_avx512_range, has_avx512, 1},
    {"avx2", float_avx2_range, double_avx2_range, has_avx2, 1},
#endif
    {"baseline", float_baseline_range, double_baseline_range, has_always, BASELINE_IS_FAST},
};
enum { INSTRUCTION_SETS = sizeof(instruction_sets) / sizeof(instruction_sets[0]) };

static int chosen = INSTRUCTION_SETS - 1;

/* Move the elements from `first` to `last`, of all leaves one after another. */
static void run(const Job *job, int64_t first, int64_t last)
{
    const Range range = job->dtypes[0] == FLOAT64 ? instruction_sets[chosen].double_range
                                              : instruction_sets[chosen].float_range;
    int64_t start = 0; /* of the leaf */
    for (int64_t leaf = 0; leaf < job->leaves && start < last; leaf++) {
        const int64_t size = job->sizes[leaf];
        const int64_t begin = first > start ? (first - start + CUT - 1) / CUT * CUT : 0;
        const int64_t end = last < start + size ? (last - start + CUT - 1) / CUT * CUT : size;
        start += size;
        if (begin < size && begin < end)
            range(job, leaf, begin, end < size ? end : size);
    }
#if X86_TARGETS
    if (job->streams)
        _mm_sfence();
#endif
}

/* Threads. Best are those that torch has already: its own loops leave them waiting for more, awake
 * for a while, and others beside them would share their cores. Where its OpenMP was not found,
 * threads are made for a call and gone after it. */

/* What a compiler calls for a parallel region, and what tells its threads apart. */
static struct {
    void (*run)(void (*)(void *), void *, unsigned, unsigned);
    int (*number)(void);
    int (*count)(void);
} team;

enum { MOST_THREADS = 256 };

/* What one thread of so many does of the work that is given. */
typedef void (*Work)(const void *given, int64_t thread, int64_t threads);

typedef struct {
    Work work;
    const void *given;
    int64_t thread, threads;
} Share;

/* All threads of the team come, and those that are not wanted go: a smaller team would end the
 * others, which the next loop of torch would have to make anew. */
static void run_in_team(void *given)
{
    const Share *share = given;
    const int64_t there = team.count(), thread = team.number();
    const int64_t threads = share->threads < there ? share->threads : there;
    if (thread < threads)
        share->work(share->given, thread, threads);
}

#if THREADS
static void *run_made(void *given)
{
    const Share *share = given;
    share->work(share->given, share->thread, share->threads);
    return NULL;
}

static void run_on_made(Work work, const void *given, int64_t threads)
{
    pthread_t made[MOST_THREADS];
    Share shares[MOST_THREADS];
    int is_made[MOST_THREADS];
    for (int64_t i = 1; i < threads; i++) {
        shares[i] = (Share){work, given, i, threads};
        is_made[i] = pthread_create(&made[i], NULL, run_made, &shares[i]) == 0;
    }
    work(given, 0, threads);
    for (int64_t i = 1; i < threads; i++) {
        if (is_made[i])
            pthread_join(made[i], NULL);
        else
            run_made(&shares[i]);
    }
}
#else
static void run_on_made(Work work, const void *given, int64_t threads)
{
    (void)threads;
    work(given, 0, 1);
}
#endif

/* Share out work that takes as long as the step of so many elements, to as many threads as are
 * worth it, of those that there may be. */
static void share_out(Work work, const void *given, int64_t elements, int64_t threads)
{
    const int64_t worth = elements / (team.run != NULL ? WORTH_A_WAITING : WORTH_A_MADE);
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    threads = threads < worth ? threads : worth;
    if (threads <= 1)
        work(given, 0, 1);
    else if (team.run != NULL) {
        Share share = {work, given, 0, threads};
        team.run(run_in_team, &share, 0, 0);
    }
    else
        run_on_made(work, given, threads);
}

/* Move the elements of one thread, of so many. */
static void run_share(const void *given, int64_t thread, int64_t threads)
{
    const Job *job = given;
    const int64_t portion = job->total / threads, end = job->begin + job->total;
    const int64_t first = job->begin + thread * portion;
    run(job, first, thread + 1 == threads ? end : first + portion);
}

/* Move all elements. */
static void run_on(const Job *job, int64_t threads)
{
    share_out(run_share, job, job->total, threads);
}
