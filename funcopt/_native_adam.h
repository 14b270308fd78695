/* The equations of Adam, with columns that may be in bfloat16. Included by `_native_steps.h`, with
 * what is defined there. */

/* `shorts` says which columns are in 16 bits. If they are rounded by chance, `random` has the words
 * of each column, WORDS apart, from which `by_chance` takes random bits. */
INLINE void NAME(adam)(const REAL *own, const REAL *const *olds, REAL *const *news,
                       int64_t count, int streamed, int coupled, int amsgrad, int shorts,
                       const uint32_t *random, int shift)
{
    const VECTOR factor = SPREAD(own[GRAD_FACTOR]), decay = SPREAD(own[DECAY]);
    const VECTOR remainder = SPREAD(own[REMAINDER]), weight = SPREAD(own[LERP_WEIGHT]);
    const VECTOR beta2 = SPREAD(own[BETA2]), gain2 = SPREAD(own[GAIN2]), eps = SPREAD(own[EPS]);
    const VECTOR descent = SPREAD(own[DESCENT]), root = SPREAD(own[CORRECTION2_ROOT]);
    const int from_average = own[LERP_FROM_AVERAGE] != 0.0, lost = amsgrad ? 4 : 3;
    const int short_slots = shorts & SHORT_SLOTS ? shorts : 0;
    const int short_params = shorts & SHORT_PARAMS ? shorts : 0;
    /* Copies, which no write through them can change. */
    const REAL *from[MOST_OLDS];
    REAL *to[MOST_NEWS];
    for (int column = 0; column < 4 + amsgrad + (shorts & LOST ? 1 : 0); column++) {
        from[column] = olds[column];
        if (column > 0)
            to[column - 1] = news[column - 1];
    }

    VECTORIZE
    for (int64_t i = 0; i < count; i += WIDTH) {
        VECTOR param = NAME(take_at)(from[0], i, short_params);
        const VECTOR average = NAME(take_at)(from[2], i, short_slots);
        VECTOR grad = NAME(take_at)(from[1], i, short_params) * factor;
        if (shorts & LOST)
            param = param + NAME(take_at)(from[lost + 1], i, 1);
        if (coupled)
            grad = MULTIPLY_ADD(param, decay, grad);
        /* As torch.lerp, which starts from the end that is nearer. */
        const VECTOR start = from_average ? average : grad;
        const VECTOR new_average = MULTIPLY_ADD(weight, grad - average, start);
        const VECTOR scaled = NAME(take_at)(from[3], i, short_slots) * beta2;
        const VECTOR square = MULTIPLY_ADD(gain2 * grad, grad, scaled);
        VECTOR largest = square;
        if (amsgrad) {
            largest = NAME(larger)(NAME(take_at)(from[4], i, short_slots), square);
            NAME(give_at)(to[3], i, largest, streamed, short_slots, random + 3 * WORDS, shift);
        }
        const VECTOR denominator = SQUARE_ROOT(largest) / root + eps;
        NAME(give_at)(to[1], i, new_average, streamed, short_slots, random + WORDS, shift);
        NAME(give_at)(to[2], i, square, streamed, short_slots, random + 2 * WORDS, shift);
        const VECTOR moved = param * remainder + descent * new_average / denominator;
#if HAS_SHORTS
        if (shorts & LOST) {
            const NAME(Bits) kept = NAME(nearest)(moved);
            NAME(put_short)((uint16_t *)to[0] + i, kept);
            NAME(put_short)((uint16_t *)to[lost] + i, NAME(lost_of)(moved, kept));
            continue;
        }
#endif
        NAME(give_at)(to[0], i, moved, streamed, short_params, random, shift);
    }
}

/* Choose the loop of Adam once for a range. */
INLINE void NAME(adams)(const Job *job, const REAL *own, const REAL *const *olds,
                        REAL *const *news, int64_t count, int streamed, int shorts,
                        const uint32_t *random, int shift)
{
    const int coupled = own[COUPLED] != 0.0, amsgrad = job->slots == 3;
    if (amsgrad && !coupled)
        NAME(adam)(own, olds, news, count, streamed, 0, 1, shorts, random, shift);
    else if (amsgrad)
        NAME(adam)(own, olds, news, count, streamed, 1, 1, shorts, random, shift);
    else if (!coupled)
        NAME(adam)(own, olds, news, count, streamed, 0, 0, shorts, random, shift);
    else
        NAME(adam)(own, olds, news, count, streamed, 1, 0, shorts, random, shift);
}
