/* Products of matrices in bfloat16: what they are made of, for any instruction set.
 *
 * A factor is copied into panels first: 16 of its rows (of the right factor, columns), of which the
 * elements at one place lie side by side. A tile of the result, 16 rows by 16 columns, is summed up
 * from two panels. Of a symmetric product the tiles above the diagonal are copied from those below.
 *
 * An element is summed up in float32 in the order of its terms and rounded once, so that no bit
 * depends on threads, or on the matrices that share a call. */

#if X86_TARGETS && defined(__clang__)
#define TILES (__clang_major__ >= 9)
#define UNROLL_TILE _Pragma("clang loop unroll(full)")
#elif X86_TARGETS
#define TILES (__GNUC__ >= 10)
#define UNROLL_TILE _Pragma("GCC unroll 16")
#else
#define TILES 0
#endif

#if TILES
#include <cpuid.h>

enum { TILE = 16, MOST_ADDENDS = 2 };
/* So many panels of the left factor and of the right one are one piece of work, or are packed. */
enum { TALL = 4, WIDE = 4, PACKED = 4 };
/* So many terms of sums take as long as the step of an element. */
enum { TERMS_LIKE_AN_ELEMENT = 64 };

typedef struct {
    const uint16_t *source;
    int64_t rows; /* of the right factor, columns */
    int is_crosswise; /* whether elements of a row lie `rows` apart, not one after another */
    uint32_t *panels;
} Factor;

typedef struct Tiles Tiles;

typedef struct {
    const Tiles *by;
    int64_t batch, depth;
    int is_symmetric;
    Factor left, right; /* with the same panels, if they are one matrix */
    int addends;
    const uint16_t *addend[MOST_ADDENDS];
    float factor[MOST_ADDENDS], alpha;
    uint16_t *result;
    int64_t *next; /* the first piece of work that no thread has taken */
} Product;

/* How an instruction set makes them. */
struct Tiles {
    const char *name;
    int (*is_there)(void);
    int (*is_faster)(void); /* than torch's products on this processor */
    int64_t elements; /* of a panel in 32 bits */
    /* Copies so many rows of a matrix, from one on at which a panel starts. */
    void (*pack)(const Product *, const Factor *, int64_t matrix, int64_t first);
    /* Makes the tiles of some panels of the left factor, and of some of the right one. */
    void (*make_piece)(const Product *, int64_t matrix, int64_t top, int64_t first);
};

INLINE int64_t over(int64_t count, int64_t part)
{
    return (count + part - 1) / part;
}

INLINE int64_t least(int64_t one, int64_t other)
{
    return one < other ? one : other;
}

/* Return how many words of 32 bits one panel has, of all its rows. */
static int64_t panel_size(const Product *product)
{
    return over(product->depth, product->by->elements) * TILE;
}

/* Return how many all panels of a matrix have. */
static int64_t size_of_panels(const Product *product, const Factor *factor)
{
    return over(factor->rows, TILE) * panel_size(product);
}

/* Return whether a tile is made: of symmetric ones those on and below the diagonal. */
INLINE int is_made(const Product *product, int64_t down, int64_t across)
{
    return !product->is_symmetric || down >= across;
}

/* Return a register of what `cpuid` says of a topic of extended features, or nothing. */
static unsigned features(unsigned topic, int index)
{
    unsigned found[4] = {0}, most, b, c, d;
    if (!__get_cpuid_count(7, 0, &most, &b, &c, &d) || most < topic)
        return 0;
    __get_cpuid_count(7, topic, &found[0], &found[1], &found[2], &found[3]);
    return found[index];
}

#include "_native_tiles_bfloat16.h"
#include "_native_tiles_float32.h"

static const Tiles all_tiles[] = {
    {"bfloat16", has_bfloat16_tiles, lacks_matrix_registers, 2, pack_pairs, make_piece_of_pairs},
    {"float32", has_avx2, lacks_short_products, 1, pack_floats, make_piece_of_floats},
};
enum { TILE_SETS = sizeof(all_tiles) / sizeof(all_tiles[0]) };

/* Return the next piece of work of so many, or their number if none is left. */
static int64_t take_piece(const Product *product, int64_t pieces)
{
    const int64_t piece = __atomic_fetch_add(product->next, 1, __ATOMIC_RELAXED);
    return least(piece, pieces);
}

static void pack_share(const void *given, int64_t thread, int64_t threads)
{
    (void)thread, (void)threads;
    const Product *product = given;
    const int is_one = product->left.panels == product->right.panels;
    const int64_t rows = PACKED * TILE, lefts = over(product->left.rows, rows);
    const int64_t each = lefts + (is_one ? 0 : over(product->right.rows, rows));
    const int64_t pieces = product->batch * each;
    for (int64_t piece; (piece = take_piece(product, pieces)) < pieces;) {
        const int64_t own = piece % each;
        if (own < lefts)
            product->by->pack(product, &product->left, piece / each, own * rows);
        else
            product->by->pack(product, &product->right, piece / each, (own - lefts) * rows);
    }
}

static void make_share(const void *given, int64_t thread, int64_t threads)
{
    (void)thread, (void)threads;
    const Product *product = given;
    const int64_t lefts = over(product->left.rows, TILE), rights = over(product->right.rows, TILE);
    const int64_t row = over(rights, WIDE), each = over(lefts, TALL) * row;
    const int64_t pieces = product->batch * each;
    for (int64_t piece; (piece = take_piece(product, pieces)) < pieces;) {
        const int64_t top = piece % each / row * TALL, first = piece % row * WIDE;
        product->by->make_piece(product, piece / each, top, first);
    }
}

/* Make a product. */
static void multiply(const Product *product, int64_t threads)
{
    const double size = (double)(product->batch * product->left.rows * product->right.rows);
    const double elements = size * (double)product->depth / TERMS_LIKE_AN_ELEMENT;
    const int64_t worth = elements < 0x1p62 ? (int64_t)elements : INT64_MAX;
    *product->next = 0;
    share_out(pack_share, product, worth, threads);
    *product->next = 0;
    share_out(make_share, product, worth, threads);
}

/* Those in use: found once, as a virtual machine takes long to say what there is. */
static const Tiles *tiles = NULL;

static void find_tiles(void)
{
    tiles = NULL;
    for (int i = 0; tiles == NULL && i < TILE_SETS; i++)
        if (all_tiles[i].is_there() && all_tiles[i].is_faster())
            tiles = &all_tiles[i];
}
#endif
