/* The equations of a step, vector by vector: what Adam, SGD and Lion do to a range of memory.
 *
 * This file is included for float and for double, and for each set of instructions, with these
 * defined: REAL; INTEGER, which is as large; WIDTH, how many of them make a vector; OP(name), the
 * intrinsic of this name; NAME(name). At a width of 1 a vector is an element, in plain C.
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

/* How a column is on its way to the registers and back: as it is, or in bfloat16. */

#if HAS_SHORTS
INLINE VECTOR NAME(widened)(const uint16_t *source)
{
    NAME(Shorts) shorts;
    memcpy(&shorts, source, sizeof(shorts));
    return (VECTOR)(__builtin_convertvector(shorts, NAME(Bits)) << 16);
}

/* Return the bits of the nearest bfloat16, as `to_bfloat16` does. */
INLINE NAME(Bits) NAME(nearest)(VECTOR vector)
{
    const NAME(Bits) bits = (NAME(Bits))vector;
    const NAME(Bits) rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const NAME(Bits) is_nan = (NAME(Bits))((bits & 0x7FFFFFFF) > 0x7F800000);
    return (is_nan & 0x7FC0) | (~is_nan & rounded);
}

INLINE void NAME(put_short)(uint16_t *target, NAME(Bits) bits)
{
    const NAME(Shorts) shorts = __builtin_convertvector(bits, NAME(Shorts));
    memcpy(target, &shorts, sizeof(shorts));
}

/* Return the bits of what is lost of a parameter, as `find_lost` does. */
INLINE NAME(Bits) NAME(lost_of)(VECTOR param, NAME(Bits) kept)
{
    const VECTOR own = (VECTOR)(kept << 16);
    const NAME(Bits) rest = NAME(nearest)(param - own);
    const NAME(Bits) again = NAME(nearest)(own + (VECTOR)(rest << 16));
    const NAME(Bits) is_finite = (NAME(Bits))((kept & 0x7FFF) < 0x7F80);
    return (rest + (NAME(Bits))(again != kept)) & is_finite; /* what is true is -1 */
}
#endif

INLINE VECTOR NAME(take_at)(const REAL *source, int64_t i, int is_short)
{
#if HAS_SHORTS
    if (is_short)
        return NAME(widened)((const uint16_t *)source + i);
#endif
    (void)is_short;
    return LOAD(source + i);
}

/* Write a vector, past the cache if `streamed`. */
INLINE void NAME(put)(REAL *target, VECTOR vector, int streamed)
{
    if (streamed)
        STREAM(target, vector);
    else
        STORE(target, vector);
}

INLINE void NAME(give_at)(REAL *target, int64_t i, VECTOR vector, int streamed, int is_short)
{
#if HAS_SHORTS
    if (is_short) {
        NAME(put_short)((uint16_t *)target + i, NAME(nearest)(vector));
        return;
    }
#endif
    (void)is_short;
    NAME(put)(target + i, vector, streamed);
}

/* With `lost`, the column of what was lost of the parameters, they are in 16 bits. */
INLINE void NAME(adam)(const double *own, const REAL *const *olds, REAL *const *news,
                       int64_t count, int streamed, int coupled, int amsgrad, int short_slots,
                       int lost)
{
    const VECTOR factor = SPREAD(own[GRAD_FACTOR]), decay = SPREAD(own[DECAY]);
    const VECTOR remainder = SPREAD(own[REMAINDER]), weight = SPREAD(own[LERP_WEIGHT]);
    const VECTOR beta2 = SPREAD(own[BETA2]), gain2 = SPREAD(own[GAIN2]), eps = SPREAD(own[EPS]);
    const VECTOR descent = SPREAD(own[DESCENT]), root = SPREAD(own[CORRECTION2_ROOT]);
    const int from_average = own[LERP_FROM_AVERAGE] != 0.0;

    VECTORIZE
    for (int64_t i = 0; i < count; i += WIDTH) {
        VECTOR param = NAME(take_at)(olds[0], i, lost);
        const VECTOR average = NAME(take_at)(olds[2], i, short_slots);
        VECTOR grad = NAME(take_at)(olds[1], i, lost) * factor;
        if (lost)
            param = param + NAME(take_at)(olds[lost + 1], i, 1);
        if (coupled)
            grad = MULTIPLY_ADD(param, decay, grad);
        /* As torch.lerp, which starts from the end that is nearer. */
        const VECTOR start = from_average ? average : grad;
        const VECTOR new_average = MULTIPLY_ADD(weight, grad - average, start);
        const VECTOR scaled = NAME(take_at)(olds[3], i, short_slots) * beta2;
        const VECTOR square = MULTIPLY_ADD(gain2 * grad, grad, scaled);
        VECTOR largest = square;
        if (amsgrad) {
            largest = NAME(larger)(NAME(take_at)(olds[4], i, short_slots), square);
            NAME(give_at)(news[3], i, largest, streamed, short_slots);
        }
        const VECTOR denominator = SQUARE_ROOT(largest) / root + eps;
        NAME(give_at)(news[1], i, new_average, streamed, short_slots);
        NAME(give_at)(news[2], i, square, streamed, short_slots);
        const VECTOR moved = param * remainder + descent * new_average / denominator;
#if HAS_SHORTS
        if (lost) {
            const NAME(Bits) kept = NAME(nearest)(moved);
            NAME(put_short)((uint16_t *)news[0] + i, kept);
            NAME(put_short)((uint16_t *)news[lost] + i, NAME(lost_of)(moved, kept));
            continue;
        }
#endif
        NAME(put)(news[0] + i, moved, streamed);
    }
}

/* Choose the loop of Adam once for a range. */
INLINE void NAME(adams)(const Job *job, const double *own, const REAL *const *olds,
                        REAL *const *news, int64_t count, int streamed, int short_slots,
                        int is_lost)
{
    const int coupled = own[COUPLED] != 0.0, amsgrad = job->slots == 3;
    if (amsgrad && !coupled)
        NAME(adam)(own, olds, news, count, streamed, 0, 1, short_slots, is_lost ? 4 : 0);
    else if (amsgrad)
        NAME(adam)(own, olds, news, count, streamed, 1, 1, short_slots, is_lost ? 4 : 0);
    else if (!coupled)
        NAME(adam)(own, olds, news, count, streamed, 0, 0, short_slots, is_lost ? 3 : 0);
    else
        NAME(adam)(own, olds, news, count, streamed, 1, 0, short_slots, is_lost ? 3 : 0);
}

INLINE void NAME(sgd)(const double *own, const REAL *const *olds, REAL *const *news, int64_t count,
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

INLINE void NAME(lion)(const double *own, const REAL *const *olds, REAL *const *news,
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
INLINE void NAME(vectors)(const Job *job, const double *own, const REAL *const *olds,
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
        NAME(adams)(job, own, olds, news, count, streamed, 0, 0);
}

/* Write what lies within a block of a column, from `place` in the leaf on, as its dtype wants it. */
INLINE void NAME(give_rounded)(const Job *job, int column, int64_t leaf, int64_t member,
                               int64_t place, const REAL *values, char *target, int64_t count)
{
    const int dtype = job->dtypes[old_of(column)];
    uint16_t random[BLOCK];
    if (job->rounding != STOCHASTIC || job->items[old_of(column)] != 2) {
        JOIN(give, REAL)(dtype, values, target, count);
        return;
    }
    fill_random(random, job->keys + 2 * member, job->ids[leaf], column, place / BLOCK);
    JOIN(give_by, REAL)(dtype, values, random + place % BLOCK, target, count);
}

/* Move elements by way of blocks that stay in the cache: 16-bit ones, which are computed in float,
 * and those behind the last whole vector. Columns that are computed in as they are need no copy. */
static void NAME(staged)(const Job *job, int64_t leaf, int64_t begin, int64_t end, int64_t member)
{
    REAL loaded[MOST_OLDS][BLOCK], computed[MOST_NEWS][BLOCK];
    const REAL *olds[MOST_OLDS];
    REAL *news[MOST_NEWS];
    const double *own = job->coefficients + member * COEFFICIENTS;
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

/* Move the elements of one leaf from `begin` to `end`, which are of one member. */
static void NAME(range)(const Job *job, int64_t leaf, int64_t begin, int64_t end, int64_t member)
{
    const double *own = job->coefficients + member * COEFFICIENTS;
    const int shorts = HAS_SHORTS && own[ROUNDED_FACTOR] == 1.0 ? job->shorts : 0;
    const int64_t count = job->is_wide || shorts ? (end - begin) / WIDTH * WIDTH : 0;
    const REAL *olds[MOST_OLDS];
    REAL *news[MOST_NEWS];
    if (count > 0) {
        for (int column = 0; column < job->old_columns; column++)
            olds[column] = (const REAL *)(old_at(job, column, leaf) + begin * job->items[column]);
        for (int column = 0; column < job->new_columns; column++)
            news[column] =
                (REAL *)(new_at(job, column, leaf) + begin * job->items[old_of(column)]);
        if (shorts == SHORT_SLOTS)
            NAME(adams)(job, own, olds, news, count, 0, 1, 0);
        else if (shorts == LOST)
            NAME(adams)(job, own, olds, news, count, 0, 0, 1);
        else if (shorts)
            NAME(adams)(job, own, olds, news, count, 0, 1, 1);
        else if (is_streamed(job, leaf, begin, count))
            NAME(vectors)(job, own, olds, news, count, 1);
        else
            NAME(vectors)(job, own, olds, news, count, 0);
    }
    if (begin + count < end)
        NAME(staged)(job, leaf, begin + count, end, member);
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
#undef HAS_SHORTS
#undef NAME
