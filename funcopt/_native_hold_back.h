/* What `Cautious` does to an update that was made, vector by vector. Included by `_native_steps.h`,
 * with what is defined there.
 *
 * `olds` are the parameter before the update and the gradient, `news` the parameter after it. */

#if WIDTH == 1
/* Return whether both are above zero, or both below. */
INLINE int NAME(same)(REAL one, REAL other)
{
    return (one > 0 && other > 0) || (one < 0 && other < 0);
}
#define CHOOSE(condition, yes, no) ((condition) ? (yes) : (no))
#else
/* Return where both are above zero, or both below: where the other one, with its sign changed if
 * the first is negative, is above zero. */
INLINE NAME(Mask) NAME(same)(VECTOR one, VECTOR other)
{
    const NAME(Mask) sign = (NAME(Mask))SPREAD(-0.0);
    const VECTOR changed = (VECTOR)((NAME(Mask))other ^ ((NAME(Mask))one & sign));
    const VECTOR size = (VECTOR)((NAME(Mask))one & ~sign);
    return (changed > SPREAD(0)) & (size > SPREAD(0));
}
#define CHOOSE(condition, yes, no) \
    ((VECTOR)(((condition) & (NAME(Mask))(yes)) | (~(condition) & (NAME(Mask))(no))))
#endif

/* Return how many elements go the way of the gradient. */
INLINE int64_t NAME(agreeing)(const REAL *own, const REAL *const *olds, REAL *const *news,
                              int64_t count)
{
    const VECTOR way = SPREAD(own[WAY]);
    int64_t found = 0;
#if WIDTH == 1
    for (int64_t i = 0; i < count; i++)
        found += NAME(same)(news[0][i] - olds[0][i], olds[1][i] * way);
#else
    NAME(Mask) each = (NAME(Mask))SPREAD(0);
    for (int64_t i = 0; i < count; i += WIDTH)
        each -= NAME(same)(LOAD(news[0] + i) - LOAD(olds[0] + i), LOAD(olds[1] + i) * way);
    for (int lane = 0; lane < WIDTH; lane++)
        found += each[lane];
#endif
    return found;
}

/* Take elements back, or further, in the order of operations of torch.lerp; and let them decay. */
INLINE void NAME(hold_back)(const REAL *own, const REAL *const *olds, REAL *const *news,
                            int64_t count, int masked, int decays)
{
    const VECTOR way = SPREAD(own[WAY]), further = SPREAD(own[LERP_WEIGHT]);
    const VECTOR decay = SPREAD(own[DECAY]), zero = SPREAD(0);

    VECTORIZE
    for (int64_t i = 0; i < count; i += WIDTH) {
        const VECTOR old = LOAD(olds[0] + i), new = LOAD(news[0] + i);
        const VECTOR update = new - old;
        VECTOR moved = new;
        if (masked) {
            const VECTOR on = MULTIPLY_ADD(further, update, new);
            const VECTOR back = MULTIPLY_ADD(zero, update, old);
            moved = CHOOSE(NAME(same)(update, LOAD(olds[1] + i) * way), on, back);
        }
        if (decays)
            moved -= CHOOSE(NAME(same)(update, old), zero, decay * old);
        STORE(news[0] + i, moved);
    }
}
#undef CHOOSE

/* Make one of the passes over whole vectors of a leaf; return how many agree, of the first. */
INLINE int64_t NAME(pass)(const Job *job, const REAL *own, const REAL *const *olds,
                          REAL *const *news, int64_t count)
{
    const int masked = own[WAY] != 0.0, decays = own[COUPLED] != 0.0;
    if (job->rule == COUNT_AGREEING)
        return NAME(agreeing)(own, olds, news, count);
    if (masked && decays)
        NAME(hold_back)(own, olds, news, count, 1, 1);
    else if (masked)
        NAME(hold_back)(own, olds, news, count, 1, 0);
    else if (decays)
        NAME(hold_back)(own, olds, news, count, 0, 1);
    return 0;
}

/* Make one of the passes over the elements of one leaf from `begin` to `end`. */
static void NAME(held_back)(const Job *job, int64_t leaf, int64_t begin, int64_t end)
{
    const REAL *own = NAME(own_of)(job, leaf, 0);
    const int64_t whole = (end - begin) / WIDTH * WIDTH, rest = end - begin - whole;
    const REAL *olds[] = {(const REAL *)old_at(job, 0, leaf) + begin,
                          (const REAL *)old_at(job, 1, leaf) + begin};
    REAL *news[] = {(REAL *)new_at(job, 0, leaf) + begin};
    int64_t found = NAME(pass)(job, own, olds, news, whole);
    if (rest > 0) { /* of which what is behind them does not move, and so does not agree */
        REAL last[3][WIDTH] = {{0}};
        const REAL *last_olds[] = {last[0], last[1]};
        REAL *last_news[] = {last[2]};
        memcpy(last[0], olds[0] + whole, (size_t)rest * sizeof(REAL));
        memcpy(last[1], olds[1] + whole, (size_t)rest * sizeof(REAL));
        memcpy(last[2], news[0] + whole, (size_t)rest * sizeof(REAL));
        found += NAME(pass)(job, own, last_olds, last_news, WIDTH);
        if (job->rule == HOLD_BACK)
            memcpy(news[0] + whole, last[2], (size_t)rest * sizeof(REAL));
    }
    if (found > 0)
        add_to(&job->agreeing[leaf], found);
}
