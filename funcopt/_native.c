/* The step of many leaves on the CPU, out of place or in place, in one pass over their memory.
 *
 * `step` is given addresses and sizes. It checks all that can be checked of them before anything is
 * read or written, lets go of Python's lock, and moves the leaves on as many threads as are worth
 * their start. What it does to an element is written in `_native_steps.h`.
 *
 * It needs no header of torch, and of Python the limited API alone, so that one build serves every
 * Python from 3.11 on and every torch.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86_TARGETS 1
#include <immintrin.h>
#endif

#if !defined(_WIN32)
#define THREADS 1
#include <pthread.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
/* Into functions that are compiled for more instructions than the rest of this file. */
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

/* An element is read before it is written, and nobody reads another's. */
#if defined(__clang__)
#define ELEMENTS_ARE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ELEMENTS_ARE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define ELEMENTS_ARE_INDEPENDENT __pragma(loop(ivdep))
#endif

enum { ADAM, ADAMW, SGD, LION };
enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { MOST_OLDS = 5, MOST_NEWS = 4, MOST_NUMBERS = 7, MOST_MEMBERS = 1 << 24 };
/* So many elements of every column fit into a core's first cache. */
enum { BLOCK = 512 };
/* Threads meet at multiples of so many elements of a leaf: whole cache lines, in every dtype. */
enum { CUT = 64, CACHE_LINE = 64 };
/* From so many elements on, a second thread saves more time than its start takes. */
enum { WORTH_A_THREAD = 1 << 18 };
/* Results of a call that are larger than this are gone from the cache before they are read. */
static const int64_t BEYOND_CACHE = 16 << 20;
/* Shorter ranges of a leaf are not worth writing past the cache. */
enum { LONG = 4096 };

/* What the numbers of a step come to, for one member, rounded to what is computed in. */
enum {
    GRAD_FACTOR, /* what gradients are multiplied by, below zero to maximize */
    ROUNDED_FACTOR, /* the same, where the product is rounded to 16 bits */
    COUPLED, /* whether weight decay is part of the gradient */
    DECAY,
    DESCENT, /* minus the learning rate, or what it is after its bias correction */
    REMAINDER, /* what decoupled weight decay leaves of a parameter */
    LERP_WEIGHT,
    LERP_FROM_AVERAGE,
    BETA1,
    BETA2,
    GAIN1, /* 1 - beta1 */
    GAIN2,
    CORRECTION2_ROOT,
    EPS,
    MOMENTUM,
    GAIN, /* what the momentum buffer takes of the gradient */
    COEFFICIENTS
};

typedef struct {
    int rule, dtype, nesterov, maximize;
    int old_columns, new_columns;
    int64_t item; /* bytes of an element */
    int64_t leaves, members, total; /* total: elements of all leaves */
    int streams; /* whether results are written past the cache */
    const int64_t *sizes; /* elements of each leaf, all members together */
    char *const *addresses; /* column by column: those before the step, then those after it */
    const double *coefficients; /* for each member */
} Job;

INLINE char *old_at(const Job *job, int column, int64_t leaf)
{
    return job->addresses[column * job->leaves + leaf];
}

INLINE char *new_at(const Job *job, int column, int64_t leaf)
{
    return job->addresses[(job->old_columns + column) * job->leaves + leaf];
}

/* Whether results are written past the cache, which spares reading what is overwritten. In place
 * it was read already. */
INLINE int is_streamed(const Job *job, int64_t leaf, int64_t begin, int64_t count)
{
    uintptr_t together = 0;
    for (int column = 0; column < job->new_columns; column++)
        together |= (uintptr_t)new_at(job, column, leaf);
    together |= (uintptr_t)(begin * job->item);
    return job->streams && count >= LONG && together % CACHE_LINE == 0 &&
           old_at(job, 0, leaf) != new_at(job, 0, leaf);
}

/* The 16-bit formats, by integer arithmetic that compilers turn into vectors. */

typedef union {
    float value;
    uint32_t bits;
} Float;

INLINE float from_bits(uint32_t bits)
{
    const Float both = {.bits = bits};
    return both.value;
}

INLINE uint32_t bits_of(float value)
{
    const Float both = {.value = value};
    return both.bits;
}

INLINE float from_bfloat16(uint16_t half)
{
    return from_bits((uint32_t)half << 16);
}

INLINE uint16_t to_bfloat16(float value)
{
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

INLINE float from_float16(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    /* The exponent has another bias; that of infinity and NaN is the largest in both. */
    const uint32_t bias = (rest >= 0x7C00 ? 224u : 112u) << 23;
    const uint32_t normal = (rest << 13) + bias;
    const uint32_t subnormal = bits_of((float)(int32_t)rest * 0x1p-24f);
    return from_bits(sign | (rest < 0x0400 ? subnormal : normal));
}

INLINE uint16_t to_float16(float value)
{
    const uint32_t bits = bits_of(value), rest = bits & 0x7FFFFFFF;
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t normal = (rest - (112u << 23) + 0x0FFF + (rest >> 13 & 1)) >> 13;
    /* The last digit of a float beside a half is worth a subnormal's: the sum rounds to it. */
    const uint32_t subnormal = bits_of(from_bits(rest) + 0.5f) - bits_of(0.5f);
    uint32_t half = rest < 0x38800000 ? subnormal : normal;
    half = rest >= 0x477FF000 ? 0x7C00 : half;
    half = rest > 0x7F800000 ? 0x7E00 : half;
    return (uint16_t)(sign | half);
}

/* Elements on their way to where they are computed, and back. */

INLINE void take_float(const Job *job, const char *source, float *values, int64_t count)
{
    const uint16_t *halves = (const uint16_t *)source;
    if (job->dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            values[i] = from_bfloat16(halves[i]);
    else if (job->dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++)
            values[i] = from_float16(halves[i]);
    else
        memcpy(values, source, (size_t)count * sizeof(float));
}

INLINE void give_float(const Job *job, const float *values, char *target, int64_t count)
{
    uint16_t *halves = (uint16_t *)target;
    if (job->dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            halves[i] = to_bfloat16(values[i]);
    else if (job->dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++)
            halves[i] = to_float16(values[i]);
    else
        memcpy(target, values, (size_t)count * sizeof(float));
}

/* A 16-bit gradient times a number is a 16-bit gradient. */
INLINE void scale_rounded_float(const Job *job, float factor, float *values, int64_t count)
{
    if (job->dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            values[i] = from_bfloat16(to_bfloat16(values[i] * factor));
    else
        for (int64_t i = 0; i < count; i++)
            values[i] = from_float16(to_float16(values[i] * factor));
}

INLINE void take_double(const Job *job, const char *source, double *values, int64_t count)
{
    (void)job;
    memcpy(values, source, (size_t)count * sizeof(double));
}

INLINE void give_double(const Job *job, const double *values, char *target, int64_t count)
{
    (void)job;
    memcpy(target, values, (size_t)count * sizeof(double));
}

INLINE void scale_rounded_double(const Job *job, double factor, double *values, int64_t count)
{
    (void)job, (void)factor, (void)values, (void)count; /* no leaf in double has 16 bits */
}

/* The loops, for each set of instructions. */

#define JOIN_AS_THEY_ARE(one, other) one##_##other
#define JOIN(one, other) JOIN_AS_THEY_ARE(one, other)
#define fma_float fmaf
#define fma_double fma
#define sqrt_float sqrtf
#define sqrt_double sqrt

#define REAL float
#define INTEGER int32_t
#define WIDTH 1
#define OP(name) name##_float
#define NAME(name) float_baseline_##name
#include "_native_steps.h"
#define REAL double
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
#define INTEGER int32_t
#define WIDTH 8
#define OP(name) _mm256_##name##_ps
#define NAME(name) float_avx2_##name
#include "_native_steps.h"
#define REAL double
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
#define INTEGER int32_t
#define WIDTH 16
#define OP(name) _mm512_##name##_ps
#define NAME(name) float_avx512_##name
#include "_native_steps.h"
#define REAL double
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

typedef void (*Range)(const Job *, int64_t, int64_t, int64_t, const double *);

#if X86_TARGETS
static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
}

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

static int has_always(void)
{
    return 1;
}

/* Without an instruction for it, a fused multiply-add is a call of a function: right, but slow. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__) || defined(_M_ARM64)
#define BASELINE_IS_FAST 1
#else
#define BASELINE_IS_FAST 0
#endif

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
    const Range range = job->dtype == FLOAT64 ? instruction_sets[chosen].double_range
                                              : instruction_sets[chosen].float_range;
    int64_t start = 0; /* of the leaf */
    for (int64_t leaf = 0; leaf < job->leaves && start < last; leaf++) {
        const int64_t size = job->sizes[leaf], own = size / job->members;
        int64_t begin = first > start ? (first - start + CUT - 1) / CUT * CUT : 0;
        int64_t end = last < start + size ? (last - start + CUT - 1) / CUT * CUT : size;
        end = end < size ? end : size;
        start += size;
        while (begin < end) {
            const int64_t member = begin / own, next = (member + 1) * own;
            const int64_t stop = next < end ? next : end;
            range(job, leaf, begin, stop, job->coefficients + member * COEFFICIENTS);
            begin = stop;
        }
    }
#if X86_TARGETS
    if (job->streams)
        _mm_sfence();
#endif
}

/* Threads. They are made for a call and gone after it, and none waits in between. */

#if THREADS
enum { MOST_THREADS = 256 };

typedef struct {
    const Job *job;
    int64_t first, last;
} Share;

static void *run_share(void *given)
{
    const Share *share = given;
    run(share->job, share->first, share->last);
    return NULL;
}

static void run_on(const Job *job, int64_t threads)
{
    pthread_t made[MOST_THREADS];
    Share shares[MOST_THREADS];
    int is_made[MOST_THREADS];
    const int64_t portion = job->total / threads;
    for (int64_t i = 1; i < threads; i++) {
        shares[i].job = job;
        shares[i].first = i * portion;
        shares[i].last = i + 1 == threads ? job->total : (i + 1) * portion;
        is_made[i] = pthread_create(&made[i], NULL, run_share, &shares[i]) == 0;
    }
    run(job, 0, threads > 1 ? portion : job->total);
    for (int64_t i = 1; i < threads; i++) {
        if (is_made[i])
            pthread_join(made[i], NULL);
        else
            run_share(&shares[i]);
    }
}
#else
enum { MOST_THREADS = 1 };

static void run_on(const Job *job, int64_t threads)
{
    (void)threads;
    run(job, 0, job->total);
}
#endif

/* The coefficients of one member. They are found in double, as torch does, and rounded once. */

static double rounded(const Job *job, double value)
{
    return job->dtype == FLOAT64 ? value : (double)(float)value;
}

static void set_grad_factor(const Job *job, double scale, double *own)
{
    const double sign = job->maximize ? -1.0 : 1.0;
    const int is_16_bit = job->item == 2;
    own[GRAD_FACTOR] = is_16_bit ? sign : sign * rounded(job, scale);
    own[ROUNDED_FACTOR] = is_16_bit ? rounded(job, scale) : 1.0;
}

static void set_adam(const Job *job, const double *numbers, double *own)
{
    const double step = numbers[0], lr = numbers[1], beta1 = numbers[2], beta2 = numbers[3];
    const double weight_decay = numbers[5];
    const double weight = rounded(job, 1 - beta1);
    own[LERP_FROM_AVERAGE] = weight < 0.5;
    own[LERP_WEIGHT] = weight < 0.5 ? weight : rounded(job, weight - 1);
    own[BETA2] = rounded(job, beta2);
    own[GAIN2] = rounded(job, 1 - beta2);
    own[EPS] = rounded(job, numbers[4]);
    own[DECAY] = rounded(job, weight_decay);
    own[COUPLED] = job->rule == ADAM && weight_decay != 0;
    own[REMAINDER] = job->rule == ADAM ? 1.0 : rounded(job, 1 - lr * weight_decay);
    own[DESCENT] = rounded(job, -(lr / (1 - pow(beta1, step))));
    own[CORRECTION2_ROOT] = rounded(job, sqrt(1 - pow(beta2, step)));
    set_grad_factor(job, numbers[6], own);
}

static void set_sgd(const Job *job, const double *numbers, double *own)
{
    const double dampening = numbers[0] == 1 ? 0.0 : numbers[3];
    own[DESCENT] = rounded(job, -numbers[1]);
    own[MOMENTUM] = rounded(job, numbers[2]);
    own[GAIN] = rounded(job, 1 - dampening);
    own[DECAY] = rounded(job, numbers[4]);
    own[COUPLED] = numbers[4] != 0;
    set_grad_factor(job, numbers[5], own);
}

static void set_lion(const Job *job, const double *numbers, double *own)
{
    own[DESCENT] = rounded(job, -numbers[1]);
    own[BETA1] = rounded(job, numbers[2]);
    own[BETA2] = rounded(job, numbers[3]);
    own[GAIN1] = rounded(job, 1 - numbers[2]);
    own[GAIN2] = rounded(job, 1 - numbers[3]);
    own[DECAY] = rounded(job, numbers[4]);
    own[COUPLED] = 0;
    set_grad_factor(job, numbers[5], own);
}

static const struct {
    int fewest_olds, most_olds, numbers;
    void (*set)(const Job *, const double *, double *);
} rules[] = {
    [ADAM] = {4, 5, 7, set_adam},
    [ADAMW] = {4, 5, 7, set_adam},
    [SGD] = {2, 3, 6, set_sgd},
    [LION] = {3, 3, 6, set_lion},
};
enum { RULES = sizeof(rules) / sizeof(rules[0]) };

static const int64_t items[] = {[FLOAT32] = 4, [FLOAT64] = 8, [BFLOAT16] = 2, [FLOAT16] = 2};
enum { DTYPES = sizeof(items) / sizeof(items[0]) };

/* What Python hands over, checked. Each returns 0, or -1 with an exception set. */

/* Take a whole number within a range. */
static int take_number(PyObject *given, const char *name, int64_t least, int64_t most,
                       int64_t *number)
{
    *number = PyLong_AsLongLong(given);
    if (*number == -1 && PyErr_Occurred())
        return -1;
    if (*number >= least && *number <= most)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s=%lld: must be at least %lld and at most %lld.", name,
                 (long long)*number, (long long)least, (long long)most);
    return -1;
}

static int take_sizes(PyObject *given, Job *job, int64_t *sizes)
{
    const int64_t most = INT64_MAX / 16;
    job->total = 0;
    for (int64_t leaf = 0; leaf < job->leaves; leaf++) {
        if (take_number(PyList_GetItem(given, leaf), "size", 0, most, &sizes[leaf]) < 0)
            return -1;
        if (sizes[leaf] % job->members != 0) {
            PyErr_Format(PyExc_ValueError, "size=%lld: must be a multiple of members=%lld.",
                         (long long)sizes[leaf], (long long)job->members);
            return -1;
        }
        if (sizes[leaf] > most - job->total) {
            PyErr_SetString(PyExc_OverflowError, "sizes: more elements than memory can hold.");
            return -1;
        }
        job->total += sizes[leaf];
    }
    job->sizes = sizes;
    return 0;
}

/* Take the address of a column of a leaf, which must be able to hold what is said of it. */
static int take_address(PyObject *given, const Job *job, int64_t size, char **address)
{
    const unsigned long long number = PyLong_AsUnsignedLongLong(given);
    if (number == (unsigned long long)-1 && PyErr_Occurred())
        return -1;
    *address = (char *)(uintptr_t)number;
    if (size == 0)
        return 0;
    if (number == 0 || number % job->item != 0 || number > UINTPTR_MAX ||
        (unsigned long long)(size * job->item) > UINTPTR_MAX - number) {
        PyErr_Format(PyExc_ValueError,
                     "address=%llu: must be that of %lld elements, at a multiple of %lld.", number,
                     (long long)size, (long long)job->item);
        return -1;
    }
    return 0;
}

/* In place, the addresses of what is written are among those of what is read. */
static int take_addresses(PyObject *given, Job *job, char **addresses)
{
    const int64_t olds = job->old_columns * job->leaves, news = job->new_columns * job->leaves;
    const int64_t count = PyList_Size(given);
    if (count != olds && count != olds + news) {
        PyErr_Format(PyExc_ValueError, "addresses: must be %lld in place, else %lld, not %lld.",
                     (long long)olds, (long long)(olds + news), (long long)count);
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t size = job->sizes[i % job->leaves];
        if (take_address(PyList_GetItem(given, i), job, size, &addresses[i]) < 0)
            return -1;
    }
    for (int64_t i = count; i < olds + news; i++) {
        const int64_t place = i - olds; /* the gradients are read and not written */
        addresses[i] = addresses[place < job->leaves ? place : place + job->leaves];
    }
    job->addresses = addresses;
    return 0;
}

/* Take one number, or one for each member, into every so many doubles. */
static int take_values(PyObject *given, int64_t members, int64_t stride, double *values)
{
    if (PyFloat_Check(given)) {
        for (int64_t member = 0; member < members; member++)
            values[member * stride] = PyFloat_AsDouble(given);
        return 0;
    }
    if (!PyList_Check(given) || PyList_Size(given) != members) {
        PyErr_Format(PyExc_TypeError, "numbers: must be floats, or lists of %lld, not %R.",
                     (long long)members, given);
        return -1;
    }
    for (int64_t member = 0; member < members; member++) {
        const double value = PyFloat_AsDouble(PyList_GetItem(given, member));
        if (value == -1.0 && PyErr_Occurred())
            return -1;
        values[member * stride] = value;
    }
    return 0;
}

static int take_numbers(PyObject *given, Job *job, double *numbers, double *coefficients)
{
    const int64_t wanted = rules[job->rule].numbers;
    if (PyTuple_Size(given) != wanted) {
        PyErr_Format(PyExc_ValueError, "numbers: must be %lld, not %lld.", (long long)wanted,
                     (long long)PyTuple_Size(given));
        return -1;
    }
    for (int64_t i = 0; i < wanted; i++)
        if (take_values(PyTuple_GetItem(given, i), job->members, wanted, &numbers[i]) < 0)
            return -1;
    for (int64_t member = 0; member < job->members; member++)
        rules[job->rule].set(job, numbers + member * wanted, coefficients + member * COEFFICIENTS);
    job->coefficients = coefficients;
    return 0;
}

/* Take what is said of all leaves together. */
static int take_kind(PyObject *const *given, Job *job, int64_t *threads)
{
    int64_t rule, dtype, columns, maximize, nesterov;
    if (take_number(given[0], "rule", 0, RULES - 1, &rule) < 0 ||
        take_number(given[1], "dtype", 0, DTYPES - 1, &dtype) < 0 ||
        take_number(given[2], "columns", rules[rule].fewest_olds, rules[rule].most_olds,
                    &columns) < 0 ||
        take_number(given[3], "maximize", 0, 1, &maximize) < 0 ||
        take_number(given[4], "nesterov", 0, 1, &nesterov) < 0 ||
        take_number(given[5], "members", 1, MOST_MEMBERS, &job->members) < 0 ||
        take_number(given[6], "threads", 1, INT64_MAX, threads) < 0)
        return -1;
    job->rule = (int)rule;
    job->dtype = (int)dtype;
    job->old_columns = (int)columns;
    job->new_columns = (int)columns - 1;
    job->maximize = (int)maximize;
    job->nesterov = (int)nesterov;
    job->item = items[dtype];
    return 0;
}

/* How many threads are worth their start, of those that there may be. */
static int64_t worth_threads(const Job *job, int64_t threads)
{
    const int64_t worth = job->total / WORTH_A_THREAD;
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    threads = threads < worth ? threads : worth;
    return threads > 1 ? threads : 1;
}

static PyObject *run_job(PyObject *const *given, Job *job, int64_t threads)
{
    const size_t columns = (size_t)(job->old_columns + job->new_columns);
    const size_t leaves = (size_t)job->leaves, members = (size_t)job->members;
    const size_t numbers = members * (size_t)rules[job->rule].numbers;
    const size_t bytes = leaves * (columns * sizeof(char *) + sizeof(int64_t)) +
                         (members * COEFFICIENTS + numbers) * sizeof(double);
    char *memory = PyMem_Malloc(bytes);
    if (memory == NULL)
        return PyErr_NoMemory();
    double *coefficients = (double *)memory;
    double *values = coefficients + members * COEFFICIENTS;
    int64_t *sizes = (int64_t *)(values + numbers);
    char **addresses = (char **)(sizes + leaves);

    PyObject *result = NULL;
    if (take_sizes(given[7], job, sizes) == 0 && take_addresses(given[8], job, addresses) == 0 &&
        take_numbers(given[9], job, values, coefficients) == 0) {
        job->streams = job->total * job->item * job->new_columns > BEYOND_CACHE;
        Py_BEGIN_ALLOW_THREADS
        run_on(job, worth_threads(job, threads));
        Py_END_ALLOW_THREADS
        result = Py_None;
        Py_INCREF(result);
    }
    PyMem_Free(memory);
    return result;
}

PyDoc_STRVAR(step_doc,
             "step(rule, dtype, columns, maximize, nesterov, members, threads, sizes, addresses, "
             "numbers)\n--\n\n"
             "Move leaves by one step.\n\n"
             "`columns` of tensors are read: parameters, gradients and slots. `sizes` has the\n"
             "elements of each leaf, all of its `members` together, which lie one after another.\n"
             "`addresses` has for each column one address a leaf: of what is read, and after these\n"
             "of what is written, unless that is the same. `numbers` are the count of updates, the\n"
             "hyperparameters of the rule and the scale of the gradients: each a float, or a list\n"
             "of one for each member. Nothing is read or written if any of it cannot be.\n\n"
             "Memory must not overlap but where it is the same, and must hold so many elements.");

static PyObject *step(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
    (void)module;
    Job job = {0};
    int64_t threads;
    if (count != 10) {
        PyErr_Format(PyExc_TypeError, "step takes 10 arguments, not %zd.", count);
        return NULL;
    }
    if (!PyList_Check(given[7]) || !PyList_Check(given[8]) || !PyTuple_Check(given[9])) {
        PyErr_SetString(PyExc_TypeError, "sizes and addresses: must be lists, numbers a tuple.");
        return NULL;
    }
    if (take_kind(given, &job, &threads) < 0)
        return NULL;
    job.leaves = PyList_Size(given[7]);
    return run_job(given, &job, threads);
}

PyDoc_STRVAR(instructions_doc,
             "instructions()\n--\n\n"
             "Return the instruction sets that this processor has, best first: pairs of a name and\n"
             "whether it has what makes a step fast. The first one is in use, unless `use` chose.");

static PyObject *instructions(PyObject *module, PyObject *nothing)
{
    (void)module, (void)nothing;
    PyObject *found = PyList_New(0);
    for (int i = 0; found != NULL && i < INSTRUCTION_SETS; i++) {
        if (!instruction_sets[i].is_there())
            continue;
        PyObject *pair = Py_BuildValue("(sN)", instruction_sets[i].name,
                                       PyBool_FromLong(instruction_sets[i].is_fast));
        if (pair == NULL || PyList_Append(found, pair) < 0)
            Py_CLEAR(found);
        Py_XDECREF(pair);
    }
    return found;
}

PyDoc_STRVAR(use_doc, "use(name)\n--\n\n"
                      "Use the instruction set of this name from now on. Results do not depend on "
                      "it.");

static PyObject *use(PyObject *module, PyObject *given)
{
    (void)module;
    PyObject *text = PyUnicode_AsUTF8String(given);
    if (text == NULL)
        return NULL;
    const char *name = PyBytes_AsString(text);
    int found = -1;
    for (int i = 0; i < INSTRUCTION_SETS; i++)
        if (strcmp(name, instruction_sets[i].name) == 0 && instruction_sets[i].is_there())
            found = i;
    Py_DECREF(text);
    if (found < 0) {
        PyErr_Format(PyExc_ValueError, "%R: this processor has no such instruction set.", given);
        return NULL;
    }
    chosen = found;
    Py_RETURN_NONE;
}

static int start(PyObject *module)
{
    (void)module;
    chosen = 0;
    while (!instruction_sets[chosen].is_there())
        chosen++;
    return 0;
}

static PyMethodDef methods[] = {
    {"step", (PyCFunction)(void (*)(void))step, METH_FASTCALL, step_doc},
    {"instructions", instructions, METH_NOARGS, instructions_doc},
    {"use", use, METH_O, use_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)start},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "funcopt._native",
    .m_doc = "The step of many leaves on the CPU, in one pass over their memory.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
