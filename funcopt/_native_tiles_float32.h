/* Products of matrices in bfloat16 by arithmetic in float32, of AVX2.
 *
 * They are for processors without an instruction for bfloat16, on which torch multiplies element by
 * element. A panel holds floats, in which the product of two bfloat16 is exact. The tiles of a piece
 * are summed up by parts of their depth, so that what is read stays in the nearest caches; their
 * sums lie in memory meanwhile. */

/* So many terms are summed up at a time, and so many rows of a tile in registers. */
enum { DEEP = 256, HIGH = 6 };

/* Return whether torch has no fast products here: it makes them by AVX-512 of any kind, and by
 * AVX-NE-CONVERT. */
static int lacks_short_products(void)
{
    return !has_avx512() && (features(1, 3) >> 5 & 1) == 0;
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

/* Return eight bfloat16 as floats, of which they are the upper halves. */
INLINE __m256 as_floats(const uint16_t *source)
{
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

INLINE float as_float(uint16_t half)
{
    const uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, sizeof(value));
    return value;
}

/* Copy eight elements of each of up to eight rows into columns of a panel, turned. */
INLINE void pack_eights(const uint16_t *source, int64_t step, int64_t rows, float *target)
{
    __m256 own[8], pairs[8], fours[8];
    UNROLL_TILE
    for (int i = 0; i < 8; i++)
        own[i] = i < rows ? as_floats(source + i * step) : _mm256_setzero_ps();
    UNROLL_TILE
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(own[i], own[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(own[i], own[i + 1]);
    }
    UNROLL_TILE
    for (int i = 0; i < 8; i += 4)
        UNROLL_TILE
        for (int half = 0; half < 2; half++) {
            const __m256 one = pairs[i + half], other = pairs[i + 2 + half];
            fours[i + 2 * half] = _mm256_shuffle_ps(one, other, 0x44);
            fours[i + 2 * half + 1] = _mm256_shuffle_ps(one, other, 0xEE);
        }
    UNROLL_TILE
    for (int i = 0; i < 4; i++) {
        _mm256_store_ps(target + i * TILE, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
        _mm256_store_ps(target + (i + 4) * TILE,
                        _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
}

/* Copy rows of which the elements lie one after another into a panel. */
static void pack_floats_lengthwise(const uint16_t *source, int64_t rows, int64_t depth,
                                   float *panel)
{
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8)
        for (int64_t row = 0; row < TILE; row += 8)
            pack_eights(source + row * depth + k, depth, rows - row, panel + k * TILE + row);
    for (; k < depth; k++)
        for (int64_t row = 0; row < TILE; row++)
            panel[k * TILE + row] = row < rows ? as_float(source[row * depth + k]) : 0;
}

/* Copy rows of which the elements lie `step` apart, and one beside the next row's. */
static void pack_floats_crosswise(const uint16_t *source, int64_t step, int64_t rows, int64_t depth,
                                  float *panel)
{
    for (int64_t k = 0; k < depth; k++, source += step, panel += TILE) {
        if (rows == TILE) {
            _mm256_store_ps(panel, as_floats(source));
            _mm256_store_ps(panel + 8, as_floats(source + 8));
            continue;
        }
        for (int64_t row = 0; row < TILE; row++)
            panel[row] = row < rows ? as_float(source[row]) : 0;
    }
}

static void pack_floats(const Product *product, const Factor *factor, int64_t matrix, int64_t first)
{
    const int64_t depth = product->depth, size = panel_size(product);
    const int64_t last = least(first + PACKED * TILE, factor->rows);
    const uint16_t *source = factor->source + matrix * factor->rows * depth;
    float *panels = (float *)factor->panels + matrix * size_of_panels(product, factor);
    for (int64_t row = first; row < last; row += TILE) {
        const int64_t rows = least(factor->rows - row, TILE);
        if (factor->is_crosswise)
            pack_floats_crosswise(source + row, factor->rows, rows, depth,
                                  panels + row / TILE * size);
        else
            pack_floats_lengthwise(source + row * depth, rows, depth, panels + row / TILE * size);
    }
}

/* Add terms to the sums of so many rows of a tile, a constant where this is inlined. */
INLINE void add_rows(const float *left, const float *right, int64_t depth, float *sums,
                     const int rows)
{
    __m256 own[HIGH][2];
    UNROLL_TILE
    for (int i = 0; i < rows; i++) {
        own[i][0] = _mm256_load_ps(sums + i * TILE);
        own[i][1] = _mm256_load_ps(sums + i * TILE + 8);
    }
    for (int64_t k = 0; k < depth; k++) {
        const __m256 one = _mm256_load_ps(right + k * TILE);
        const __m256 other = _mm256_load_ps(right + k * TILE + 8);
        UNROLL_TILE
        for (int i = 0; i < rows; i++) {
            const __m256 row = _mm256_broadcast_ss(left + k * TILE + i);
            own[i][0] = _mm256_fmadd_ps(row, one, own[i][0]);
            own[i][1] = _mm256_fmadd_ps(row, other, own[i][1]);
        }
    }
    UNROLL_TILE
    for (int i = 0; i < rows; i++) {
        _mm256_store_ps(sums + i * TILE, own[i][0]);
        _mm256_store_ps(sums + i * TILE + 8, own[i][1]);
    }
}

static void add_terms(const float *left, const float *right, int64_t depth, float *sums)
{
    add_rows(left, right, depth, sums, HIGH);
    add_rows(left + HIGH, right, depth, sums + HIGH * TILE, HIGH);
    add_rows(left + 2 * HIGH, right, depth, sums + 2 * HIGH * TILE, TILE - 2 * HIGH);
}

/* Write a tile of the result, given its sums. */
static void write_sums(const Product *product, int64_t matrix, int64_t down, int64_t across,
                       const float *sums)
{
    const int64_t stride = product->right.rows;
    const int64_t rows = least(product->left.rows - down * TILE, TILE);
    const int64_t columns = least(stride - across * TILE, TILE);
    const int64_t start = matrix * product->left.rows * stride;
    const int64_t at = start + (down * stride + across) * TILE;
    uint16_t tile[TILE][TILE], mirrored[TILE][TILE];
    for (int64_t i = 0; i < rows; i++) {
        float row[TILE];
        for (int64_t j = 0; j < TILE; j++)
            row[j] = sums[i * TILE + j] * product->alpha;
        for (int other = 0; other < product->addends; other++)
            for (int64_t j = 0; j < columns; j++)
                row[j] += product->factor[other] *
                          as_float(product->addend[other][at + i * stride + j]);
        for (int64_t j = 0; j < TILE; j++)
            tile[i][j] = to_bfloat16(row[j]);
    }
    for (int64_t i = 0; i < rows && product->is_symmetric; i++)
        for (int64_t j = 0; j < columns; j++)
            mirrored[j][i] = tile[i][j];
    for (int64_t i = 0; i < rows && product->is_symmetric && down == across; i++)
        for (int64_t j = i + 1; j < columns; j++) /* what is above the diagonal */
            tile[i][j] = mirrored[i][j];
    for (int64_t i = 0; i < rows; i++)
        memcpy(product->result + at + i * stride, tile[i], (size_t)columns * sizeof(uint16_t));
    const int64_t across_from = start + (across * stride + down) * TILE;
    for (int64_t j = 0; j < columns && product->is_symmetric && down != across; j++)
        memcpy(product->result + across_from + j * stride, mirrored[j],
               (size_t)rows * sizeof(uint16_t));
}

static void make_piece_of_floats(const Product *product, int64_t matrix, int64_t top, int64_t first)
{
    const Factor *left = &product->left, *right = &product->right;
    const int64_t bottom = least(top + TALL, over(left->rows, TILE));
    const int64_t last = least(first + WIDE, over(right->rows, TILE)), size = panel_size(product);
    const float *lefts = (float *)left->panels + matrix * size_of_panels(product, left);
    const float *rights = (float *)right->panels + matrix * size_of_panels(product, right);
    __attribute__((aligned(CACHE_LINE))) float sums[WIDE][TALL][TILE * TILE] = {0};
    for (int64_t k = 0; k < product->depth; k += DEEP)
        for (int64_t across = first; across < last; across++)
            for (int64_t down = top; down < bottom; down++)
                if (is_made(product, down, across))
                    add_terms(lefts + down * size + k * TILE, rights + across * size + k * TILE,
                              least(product->depth - k, DEEP), sums[across - first][down - top]);
    for (int64_t across = first; across < last; across++)
        for (int64_t down = top; down < bottom; down++)
            if (is_made(product, down, across))
                write_sums(product, matrix, down, across, sums[across - first][down - top]);
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
