/* What is to be done, and how elements are read and written: what every other part builds on. */

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

/* The rules of steps; and the two passes that hold an update back, of which no step is made. */
enum { ADAM, ADAMW, SGD, LION, COUNT_AGREEING, HOLD_BACK };
enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { NEAREST, STOCHASTIC, COMPENSATED };
/* What is in bfloat16: slots, parameters with gradients, what was lost of those; and whether these
 * are rounded by chance. */
enum { SHORT_SLOTS = 1, SHORT_PARAMS = 2, LOST = 4, BY_CHANCE = 8 };
enum { MOST_OLDS = 6, MOST_NEWS = 5 };
static const int64_t MOST_MEMBERS = (int64_t)1 << 40;
/* So many elements of every column fit into a core's first cache. Random bits come for so many. */
enum { BLOCK = 512, QUARTER = BLOCK / 4 };
/* Threads meet at multiples of so many elements of a leaf: whole cache lines, in every dtype. */
enum { CUT = 64, CACHE_LINE = 64 };
/* So many elements of its own are worth a thread that waits already, or one that is made. */
enum { WORTH_A_WAITING = 1 << 14, WORTH_A_MADE = 1 << 18 };
/* Results of a call that are larger than this are gone from the cache before they are read. */
static const int64_t BEYOND_CACHE = 16 << 20;
/* Shorter ranges of a leaf are not worth writing past the cache. */
enum { LONG = 4096 };

/* What the numbers of a step come to, for one member. */
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
    WAY, /* the sign of an update times the gradient where it goes on, 0 where it is not asked */
    GAIN, /* what the momentum buffer takes of the gradient */
    ACTIVE, /* 0 for a member that stays as it is */
    COEFFICIENTS
};

typedef struct {
    int rule, nesterov, maximize, rounding;
    int old_columns, new_columns;
    int slots; /* those of the rule; the compensation of a parameter comes after them */
    int dtypes[MOST_OLDS]; /* of the columns before the step */
    int64_t items[MOST_OLDS]; /* bytes of an element of each */
    int is_wide; /* whether every column is in the dtype that is computed in */
    int shorts; /* which columns are in bfloat16, of steps that have a loop for it */
    int64_t per_leaf; /* whether numbers are those of leaves, and not of members */
    int64_t leaves, members, total; /* total: elements of all leaves */
    int64_t begin; /* the element, of all leaves one after another, with which threads begin */
    int streams; /* whether results are written past the cache */
    const int64_t *sizes; /* elements of each leaf, all members together */
    const int64_t *ids; /* which leaf of the whole tree each is */
    char *const *addresses; /* column by column: those before the step, then those after it */
    void *coefficients; /* for each member, or each leaf, in what is computed in */
    int64_t *agreeing; /* for each leaf, how many elements are not held back */
    const uint64_t *keys; /* for each member, and behind it the count of updates: of random bits */
} Job;

/* Add to a number to which other threads add, too. */
INLINE void add_to(int64_t *number, int64_t more)
{
#if THREADS
    __atomic_fetch_add(number, more, __ATOMIC_RELAXED);
#else
    *number += more;
#endif
}

/* Return how many rows of numbers there are: one for each member, or each leaf. */
INLINE int64_t rows_of(const Job *job)
{
    return job->per_leaf ? job->leaves : job->members;
}

/* Return the row of the coefficients of a member of a leaf. */
INLINE int64_t row_of(const Job *job, int64_t leaf, int64_t member)
{
    return job->per_leaf ? leaf : member;
}

/* Set the coefficients of a row, rounded to what is computed in. */
INLINE void set_row(const Job *job, int64_t row, const double *own)
{
    if (job->dtypes[0] == FLOAT64)
        memcpy((double *)job->coefficients + row * COEFFICIENTS, own, COEFFICIENTS * sizeof(double));
    else
        for (int i = 0; i < COEFFICIENTS; i++)
            ((float *)job->coefficients)[row * COEFFICIENTS + i] = (float)own[i];
}

/* Return which column before the step a column after it takes the place of. */
INLINE int old_of(int new_column)
{
    return new_column == 0 ? 0 : new_column + 1;
}

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
    if (!job->streams || count < LONG)
        return 0;
    for (int column = 0; column < job->new_columns; column++)
        together |= (uintptr_t)new_at(job, column, leaf);
    together |= (uintptr_t)(begin * job->items[0]);
    return together % CACHE_LINE == 0 && old_at(job, 0, leaf) != new_at(job, 0, leaf);
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

INLINE void take_float(int dtype, const char *source, float *values, int64_t count)
{
    const uint16_t *halves = (const uint16_t *)source;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            values[i] = from_bfloat16(halves[i]);
    else if (dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++)
            values[i] = from_float16(halves[i]);
    else
        memcpy(values, source, (size_t)count * sizeof(float));
}

INLINE void give_float(int dtype, const float *values, char *target, int64_t count)
{
    uint16_t *halves = (uint16_t *)target;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            halves[i] = to_bfloat16(values[i]);
    else if (dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++)
            halves[i] = to_float16(values[i]);
    else
        memcpy(target, values, (size_t)count * sizeof(float));
}

/* A 16-bit gradient times a number is a 16-bit gradient. */
INLINE void scale_rounded_float(int dtype, float factor, float *values, int64_t count)
{
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            values[i] = from_bfloat16(to_bfloat16(values[i] * factor));
    else
        for (int64_t i = 0; i < count; i++)
            values[i] = from_float16(to_float16(values[i] * factor));
}

INLINE void take_double(int dtype, const char *source, double *values, int64_t count)
{
    (void)dtype;
    memcpy(values, source, (size_t)count * sizeof(double));
}

INLINE void give_double(int dtype, const double *values, char *target, int64_t count)
{
    (void)dtype;
    memcpy(target, values, (size_t)count * sizeof(double));
}

INLINE void scale_rounded_double(int dtype, double factor, double *values, int64_t count)
{
    (void)dtype, (void)factor, (void)values, (void)count; /* no leaf in double has 16 bits */
}
