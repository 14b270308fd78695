/* The equations of a step, vector by vector: what Adam, SGD and Lion do to a range of memory.
 *
 * This file is included for float and for double, and for each set of instructions, with these
 * defined: REAL; FLOATS, whether that is float; INTEGER, which is as large; WIDTH, how many of them
 * make a vector; OP(name), the intrinsic of this name; NAME(name). At a width of 1 a vector is an
 * element, in plain C. For vectors of float there are also PRODUCT, of the lower halves of 64 bits;
 * WHOLE, an intrinsic of this name on 32 bits; WIDEN, of 16 bits, to the upper halves of 32; UPPER,
 * of those halves.
 *
 * Every element goes the same way. MULTIPLY_ADD(a, b, c) is a * b + c with a single rounding, in
 * the places where torch's own vectors have it; all other operations are rounded one by one, for
 * which the compiler must be told not to contract them. So no bit depends on where an element lies,
 * nor on the instructions that a processor has.
 *
 * `olds` are the parameter, the gradient and the slots before the step, `news` the parameter and
 * the slots after it, in whole vectors. Old and new may be the same memory. `own` are the
 * coefficients of a member.
 */

#if WIDTH == 1
typedef REAL NAME(Vector);
#define LOAD(source) (*(source))
#define STORE(target, vector) (*(target) = (vector))
#define STREAM(target, vector) STORE(target, vector)
#define SPREAD(number) ((REAL)(number))
#define MULTIPLY_ADD(a, b, c) OP(fma)(a, b, c)
#define SQUARE_ROOT(vector) OP(sqrt)(vector)
#if BASELINE_IS_FAST
#define VECTORIZE ELEMENTS_ARE_INDEPENDENT
#else
#define VECTORIZE
#endif
#else
typedef REAL NAME(Vector) __attribute__((vector_size(WIDTH * sizeof(REAL))));
typedef INTEGER NAME(Mask) __attribute__((vector_size(WIDTH * sizeof(REAL))));
#define LOAD(source) OP(loadu)(source)
#define STORE(target, vector) OP(storeu)(target, vector)
#define STREAM(target, vector) OP(stream)(target, vector)
#define SPREAD(number) OP(set1)((REAL)(number))
#define MULTIPLY_ADD(a, b, c) OP(fmadd)(a, b, c)
#define SQUARE_ROOT(vector) OP(sqrt)(vector)
#define VECTORIZE
#endif
#define VECTOR NAME(Vector)
#define HAS_SHORTS (WIDTH >= 8 && FLOATS)
#if HAS_SHORTS
typedef uint32_t NAME(Bits) __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef uint16_t NAME(Shorts) __attribute__((vector_size(WIDTH * sizeof(uint16_t))));
#endif

/* Return the larger of two, or NaN if either is, as torch.maximum. */
INLINE VECTOR NAME(larger)(VECTOR one, VECTOR other)
{
#if WIDTH == 1
    return one > other || one != one ? one : other;
#else
    const NAME(Mask) takes_one = (one > other) | (one != one);
    return (VECTOR)((takes_one & (NAME(Mask))one) | (~takes_one & (NAME(Mask))other));
#endif
}

/* Return 1, 0 or -1; for NaN 0, as torch.sign. */
INLINE VECTOR NAME(sign)(VECTOR vector)
{
#if WIDTH == 1
    return (REAL)(vector > 0) - (REAL)(vector < 0);
#else
    const VECTOR zero = SPREAD(0);
    const NAME(Mask) one = (NAME(Mask))SPREAD(1);
    return (VECTOR)((vector > zero) & one) - (VECTOR)((vector < zero) & one);
#endif
}

/* Return the coefficients of a member of a leaf. */
INLINE const REAL *NAME(own_of)(const Job *job, int64_t leaf, int64_t member)
{
    return (const REAL *)job->coefficients + row_of(job, leaf, member) * COEFFICIENTS;
}

#include "_native_shorts.h"
#include "_native_adam.h"
#include "_native_hold_back.h"

INLINE void NAME(sgd)(const REAL *own, const REAL *const *olds, REAL *const *news, int64_t count,
                      int streamed, int coupled, int buffered, int nesterov)
{
    const VECTOR factor = SPREAD(own[GRAD_FACTOR]), decay = SPREAD(own[DECAY]);
    const VECTOR momentum = SPREAD(own[MOMENTUM]), gain = SPREAD(own[GAIN]);
    const VECTOR descent = SPREAD(own[DESCENT]);

    VECTORIZE
    for (int64_t i = 0; i < count; i += WIDTH) {
        const VECTOR param = LOAD(olds[0] + i);
        VECTOR grad = LOAD(olds[1] + i) * factor;
        if (coupled)
            grad = MULTIPLY_ADD(param, decay, grad);
        if (buffered) {
            const VECTOR scaled = LOAD(olds[2] + i) * momentum;
            const VECTOR buffer = MULTIPLY_ADD(grad, gain, scaled);
            NAME(put)(news[1] + i, buffer, streamed);
            if (nesterov)
                grad = MULTIPLY_ADD(buffer, momentum, grad);
            else
                grad = buffer;
        }
        NAME(put)(news[0] + i, MULTIPLY_ADD(grad, descent, param), streamed);
    }
}

INLINE void NAME(lion)(const REAL *own, const REAL *const *olds, REAL *const *news,
                       int64_t count, int streamed)
{
    const VECTOR factor = SPREAD(own[GRAD_FACTOR]), decay = SPREAD(own[DECAY]);
    const VECTOR beta1 = SPREAD(own[BETA1]), gain1 = SPREAD(own[GAIN1]);
    const VECTOR beta2 = SPREAD(own[BETA2]), gain2 = SPREAD(own[GAIN2]);
    const VECTOR descent = SPREAD(own[DESCENT]);

    VECTORIZE
    for (int64_t i = 0; i < count; i += WIDTH) {
        const VECTOR param = LOAD(olds[0] + i), average = LOAD(olds[2] + i);
        const VECTOR grad = LOAD(olds[1] + i) * factor;
        const VECTOR direction = NAME(sign)(grad * gain1 + average * beta1);
        NAME(put)(news[1] + i, grad * gain2 + average * beta2, streamed);
        NAME(put)(news[0] + i, param + (direction + param * decay) * descent, streamed);
    }
}

/* Choose the loop once for a range, so that within it nothing is asked. */
INLINE void NAME(vectors)(const Job *job, const REAL *own, const REAL *const *olds,
                          REAL *const *news, int64_t count, int streamed)
{
    const int coupled = own[COUPLED] != 0.0, buffered = job->slots == 1;
    if (job->rule == LION)
        NAME(lion)(own, olds, news, count, streamed);
    else if (job->rule == SGD) {
        if (!buffered && !coupled)
            NAME(sgd)(own, olds, news, count, streamed, 0, 0, 0);
        else if (!buffered)
            NAME(sgd)(own, olds, news, count, streamed, 1, 0, 0);
        else if (!job->nesterov && !coupled)
            NAME(sgd)(own, olds, news, count, streamed, 0, 1, 0);
        else if (!job->nesterov)
            NAME(sgd)(own, olds, news, count, streamed, 1, 1, 0);
        else if (!coupled)
            NAME(sgd)(own, olds, news, count, streamed, 0, 1, 1);
        else
            NAME(sgd)(own, olds, news, count, streamed, 1, 1, 1);
    }
    else
        NAME(adams)(job, own, olds, news, count, streamed, 0, NULL, 0);
}

/* Write what lies within a block of a column, from `place` of the leaf on, in its dtype. */
INLINE void NAME(give_rounded)(const Job *job, int column, int64_t leaf, int64_t member,
                               int64_t place, const REAL *values, char *target, int64_t count)
{
    const int dtype = job->dtypes[old_of(column)];
    uint32_t words[WORDS];
    uint16_t random[BLOCK];
    Keys keys;
    Start start;
    if (job->rounding != STOCHASTIC || job->items[old_of(column)] != 2) {
        JOIN(give, REAL)(dtype, values, target, count);
        return;
    }
    set_keys(job, member, &keys);
    set_start(job, &keys, member, leaf, column, place / BLOCK, &start);
    NAME(fill_words)(&keys, &start, 0, CALLS, words);
    for (int i = 0; i < WORDS; i++) {
        random[i] = (uint16_t)words[i];
        random[WORDS + i] = (uint16_t)(words[i] >> 16);
    }
    JOIN(give_by, REAL)(dtype, values, random + place % BLOCK, target, count);
}

/* Move elements by way of blocks that stay in the cache: 16-bit ones, which are computed in float,
 * and those behind the last whole vector. Columns that are computed in as they are need no copy. */
static void NAME(staged)(const Job *job, int64_t leaf, int64_t begin, int64_t end, int64_t member)
{
    REAL loaded[MOST_OLDS][BLOCK], computed[MOST_NEWS][BLOCK];
    const REAL *olds[MOST_OLDS];
    REAL *news[MOST_NEWS];
    const REAL *own = NAME(own_of)(job, leaf, member);
    const int64_t first = member * (job->sizes[leaf] / job->members);
    const int lost = job->rounding == COMPENSATED ? job->new_columns - 1 : 0;
    for (int64_t at = begin, count; at < end; at += count) {
        /* A block ends where random bits for another begin. */
        count = BLOCK - (at - first) % BLOCK;
        count = end - at < count ? end - at : count;
        const int64_t whole = (count + WIDTH - 1) / WIDTH * WIDTH;
        for (int column = 0; column < job->old_columns; column++) {
            char *source = old_at(job, column, leaf) + at * job->items[column];
            if (job->items[column] == sizeof(REAL) && whole == count && !(lost && column == 0)) {
                olds[column] = (const REAL *)source;
                continue;
            }
            olds[column] = loaded[column];
            JOIN(take, REAL)(job->dtypes[column], source, loaded[column], count);
            for (int64_t i = count; i < whole; i++)
                loaded[column][i] = 0;
        }
        if (lost)
            JOIN(compensate, REAL)(loaded[0], olds[lost + 1], count);
        if (own[ROUNDED_FACTOR] != 1.0)
            JOIN(scale_rounded, REAL)(job->dtypes[1], (REAL)own[ROUNDED_FACTOR], loaded[1], count);
        for (int column = 0; column < job->new_columns; column++) {
            const int is_wide = job->items[old_of(column)] == sizeof(REAL) && whole == count;
            char *target = new_at(job, column, leaf) + at * job->items[old_of(column)];
            news[column] = is_wide ? (REAL *)target : computed[column];
        }
        NAME(vectors)(job, own, olds, news, whole, 0);
        if (lost) {
            char *target = new_at(job, lost, leaf) + at * job->items[0];
            JOIN(find_lost, REAL)(job->dtypes[0], news[0], (uint16_t *)target, count);
        }
        for (int column = 0; column < job->new_columns - (lost > 0); column++)
            if (news[column] == computed[column])
                NAME(give_rounded)(job, column, leaf, member, at - first, computed[column],
                                   new_at(job, column, leaf) + at * job->items[old_of(column)],
                                   count);
    }
}

#if WIDTH > 1
/* Copy fewer elements than a vector has, in parts of a size that the compiler knows. */
INLINE void NAME(copy_few)(const REAL *source, REAL *target, int64_t count)
{
    for (int part = WIDTH / 2, done = 0; part > 0; part /= 2) {
        if (!(count & part))
            continue;
        memcpy(target + done, source + done, (size_t)part * sizeof(REAL));
        done += part;
    }
}

/* Move fewer elements than a vector has, of columns that are computed in as they are. The others of
 * their vectors go nowhere: they are those of the next member, if there are `room` elements from
 * here on that this thread may read, else 0. */
INLINE void NAME(move_few)(const Job *job, const REAL *own, const REAL *const *olds,
                           REAL *const *news, int64_t at, int64_t count, int64_t room)
{
    _Alignas(CACHE_LINE) REAL loaded[MOST_OLDS][WIDTH], computed[MOST_NEWS][WIDTH];
    const REAL *few_olds[MOST_OLDS];
    REAL *few_news[MOST_NEWS];
    for (int column = 0; column < job->old_columns; column++) {
        few_olds[column] = olds[column] + at;
        if (room >= WIDTH)
            continue;
        STORE(loaded[column], SPREAD(0));
        NAME(copy_few)(olds[column] + at, loaded[column], count);
        few_olds[column] = loaded[column];
    }
    for (int column = 0; column < job->new_columns; column++)
        few_news[column] = computed[column];
    NAME(vectors)(job, own, few_olds, few_news, WIDTH, 0);
    for (int column = 0; column < job->new_columns; column++)
        NAME(copy_few)(computed[column], news[column] + at, count);
}
#endif

/* Point at the elements of one leaf from `at` on. */
INLINE void NAME(point_at)(const Job *job, int64_t leaf, int64_t at, const REAL **olds,
                           REAL **news)
{
    for (int column = 0; column < job->old_columns; column++)
        olds[column] = (const REAL *)(old_at(job, column, leaf) + at * job->items[column]);
    for (int column = 0; column < job->new_columns; column++)
        news[column] = (REAL *)(new_at(job, column, leaf) + at * job->items[old_of(column)]);
}

#if HAS_SHORTS
/* The words of each column of a block, and how many calls of it have been made. */
typedef struct {
    _Alignas(CACHE_LINE) uint32_t words[MOST_NEWS][WORDS];
    int64_t block;
    int calls;
} NAME(Random);

/* Make the calls of a block until there are `calls`. */
INLINE void NAME(fill_random)(const Job *job, const Keys *keys, int64_t member, int64_t leaf,
                              NAME(Random) *random, int calls)
{
    for (int column = 0; column < job->new_columns; column++)
        if (job->items[old_of(column)] == 2) {
            Start start;
            set_start(job, keys, member, leaf, column, random->block, &start);
            NAME(fill_words)(keys, &start, random->calls, calls, random->words[column]);
        }
    random->calls = calls;
}

/* Move elements of which some columns, or all, are in bfloat16 and rounded by chance. Between the
 * quarters of a block, which wait for divisions, the random bits of the next block are made. */
static void NAME(moved_by_chance)(const Job *job, int64_t leaf, int64_t begin, int64_t end,
                                  int64_t member)
{
    NAME(Random) both[2], *own_random = &both[0], *next = &both[1];
    const REAL *olds[MOST_OLDS];
    REAL *news[MOST_NEWS];
    Keys keys;
    const REAL *own = NAME(own_of)(job, leaf, member);
    const int64_t first = member * (job->sizes[leaf] / job->members);
    own_random->block = (begin - first) / BLOCK;
    next->block = own_random->block + 1;
    own_random->calls = next->calls = 0;
    set_keys(job, member, &keys);
    NAME(fill_random)(job, &keys, member, leaf, own_random, CALLS);
    for (int64_t at = begin, count; at < end; at += count) {
        const int place = (int)((at - first) % BLOCK);
        count = QUARTER - place % QUARTER;
        count = end - at < count ? end - at : count;
        if (first + next->block * BLOCK < end)
            NAME(fill_random)(job, &keys, member, leaf, next, (place / QUARTER + 1) * (CALLS / 4));
        const int64_t whole = count / WIDTH * WIDTH;
        const uint32_t *random = own_random->words[0] + place % WORDS;
        const int shift = place / WORDS * 16;
        NAME(point_at)(job, leaf, at, olds, news);
        if (job->shorts == (SHORT_SLOTS | BY_CHANCE))
            NAME(adams)(job, own, olds, news, whole, 0, SHORT_SLOTS | BY_CHANCE, random, shift);
        else if (job->shorts == (SHORT_PARAMS | BY_CHANCE))
            NAME(adams)(job, own, olds, news, whole, 0, SHORT_PARAMS | BY_CHANCE, random, shift);
        else
            NAME(adams)(job, own, olds, news, whole, 0, SHORT_PARAMS | SHORT_SLOTS | BY_CHANCE,
                        random, shift);
        if (whole < count)
            NAME(staged)(job, leaf, at + whole, at + count, member);
        if (place + count == BLOCK) {
            NAME(Random) *const used = own_random;
            own_random = next;
            next = used;
            next->block = own_random->block + 1;
            next->calls = 0;
        }
    }
}
#endif

/* Move so many elements of one member of a leaf, of which all columns are computed in as they are,
 * and of which `room` may be read. */
INLINE void NAME(move_wide)(const Job *job, const REAL *own, const REAL *const *olds,
                            REAL *const *news, int64_t count, int64_t room, int streamed)
{
    const int64_t whole = count / WIDTH * WIDTH;
    if (whole > 0 && streamed)
        NAME(vectors)(job, own, olds, news, whole, 1);
    else if (whole > 0)
        NAME(vectors)(job, own, olds, news, whole, 0);
#if WIDTH > 1
    if (whole < count)
        NAME(move_few)(job, own, olds, news, whole, count - whole, room - whole);
#else
    (void)room;
#endif
}

/* Move the elements of one member of a leaf, from `begin` to `end`, of which some have 16 bits. */
static void NAME(move_short)(const Job *job, int64_t leaf, int64_t begin, int64_t end,
                             int64_t member)
{
    const REAL *own = NAME(own_of)(job, leaf, member);
    const int shorts = HAS_SHORTS && own[ROUNDED_FACTOR] == 1.0 ? job->shorts : 0;
    const int64_t count = shorts ? (end - begin) / WIDTH * WIDTH : 0;
    const REAL *olds[MOST_OLDS];
    REAL *news[MOST_NEWS];
#if HAS_SHORTS
    if (shorts & BY_CHANCE) {
        NAME(moved_by_chance)(job, leaf, begin, end, member);
        return;
    }
#endif
    NAME(point_at)(job, leaf, begin, olds, news);
    if (count == 0)
        ;
    else if (shorts == SHORT_SLOTS)
        NAME(adams)(job, own, olds, news, count, 0, SHORT_SLOTS, NULL, 0);
    else if (shorts == SHORT_PARAMS)
        NAME(adams)(job, own, olds, news, count, 0, SHORT_PARAMS, NULL, 0);
    else if (shorts == (SHORT_PARAMS | SHORT_SLOTS))
        NAME(adams)(job, own, olds, news, count, 0, SHORT_PARAMS | SHORT_SLOTS, NULL, 0);
    else if (shorts == (SHORT_PARAMS | LOST))
        NAME(adams)(job, own, olds, news, count, 0, SHORT_PARAMS | LOST, NULL, 0);
    else
        NAME(adams)(job, own, olds, news, count, 0, SHORT_PARAMS | SHORT_SLOTS | LOST, NULL, 0);
    if (begin + count < end)
        NAME(staged)(job, leaf, begin + count, end, member);
}

/* Move the elements of one leaf from `begin` to `end`, member by member. */
static void NAME(range)(const Job *job, int64_t leaf, int64_t begin, int64_t end)
{
    const int64_t size = job->sizes[leaf] / job->members;
    const REAL *olds[MOST_OLDS], *first_olds[MOST_OLDS];
    REAL *news[MOST_NEWS], *first_news[MOST_NEWS];
    NAME(point_at)(job, leaf, 0, first_olds, first_news);
    if (job->rule >= COUNT_AGREEING) {
        NAME(held_back)(job, leaf, begin, end);
        return;
    }
    for (int64_t member = begin / size, stop; begin < end; begin = stop, member++) {
        const REAL *own = NAME(own_of)(job, leaf, member);
        stop = (member + 1) * size < end ? (member + 1) * size : end;
        if (own[ACTIVE] == 0.0)
            keep(job, leaf, begin, stop);
        else if (job->is_wide) {
            for (int column = 0; column < job->old_columns; column++)
                olds[column] = first_olds[column] + begin;
            for (int column = 0; column < job->new_columns; column++)
                news[column] = first_news[column] + begin;
            NAME(move_wide)(job, own, olds, news, stop - begin, end - begin,
                            is_streamed(job, leaf, begin, stop - begin));
        }
        else
            NAME(move_short)(job, leaf, begin, stop, member);
    }
}

#undef LOAD
#undef STORE
#undef STREAM
#undef SPREAD
#undef MULTIPLY_ADD
#undef SQUARE_ROOT
#undef VECTOR
#undef VECTORIZE
#undef REAL
#undef INTEGER
#undef WIDTH
#undef OP
#undef FLOATS
#undef PRODUCT
#undef WIDEN
#undef WHOLE
#undef UPPER
#undef HAS_SHORTS
#undef NAME
