/* Products of matrices in bfloat16: what comes from Python, checked, and memory for panels. */

PyDoc_STRVAR(has_products_doc,
             "has_products()\n--\n\n"
             "Return whether `product` is faster than torch on this processor.");

static PyObject *has_products(PyObject *module, PyObject *nothing)
{
    (void)module, (void)nothing;
#if TILES
    return PyBool_FromLong(tiles != NULL);
#else
    return PyBool_FromLong(0);
#endif
}

PyDoc_STRVAR(products_doc,
             "products()\n--\n\n"
             "Return the names of the ways to make products that this processor has.");

static PyObject *products(PyObject *module, PyObject *nothing)
{
    (void)module, (void)nothing;
    PyObject *found = PyList_New(0);
#if TILES
    for (int i = 0; found != NULL && i < TILE_SETS; i++) {
        if (!all_tiles[i].is_there())
            continue;
        PyObject *name = PyUnicode_FromString(all_tiles[i].name);
        if (name == NULL || PyList_Append(found, name) < 0)
            Py_CLEAR(found);
        Py_XDECREF(name);
    }
#endif
    return found;
}

PyDoc_STRVAR(use_products_doc,
             "use_products(name)\n--\n\n"
             "Make products in this way from now on, of which the bits are its own; None: in the\n"
             "one that is faster than torch, if there is one.");

static PyObject *use_products(PyObject *module, PyObject *given)
{
    (void)module;
#if TILES
    if (given == Py_None) {
        find_tiles();
        Py_RETURN_NONE;
    }
    PyObject *text = PyUnicode_AsUTF8String(given);
    if (text == NULL)
        return NULL;
    const Tiles *found = NULL;
    for (int i = 0; i < TILE_SETS; i++)
        if (strcmp(PyBytes_AsString(text), all_tiles[i].name) == 0 && all_tiles[i].is_there())
            found = &all_tiles[i];
    Py_DECREF(text);
    if (found != NULL) {
        tiles = found;
        Py_RETURN_NONE;
    }
#endif
    return PyErr_Format(PyExc_ValueError, "%R: this processor makes no such products.", given);
}

PyDoc_STRVAR(product_doc,
             "product(is_symmetric, threads, batch, rows, columns, depth, left, left_is_crosswise,\n"
             "right, right_is_crosswise, result, alpha, addends)\n--\n\n"
             "Write products of bfloat16 matrices, alpha * left @ right and what is added to it.\n\n"
             "`left` is the address of a `batch` of matrices of `rows` by `depth`, `right` of\n"
             "`depth` by `columns`, `result` of `rows` by `columns`. They lie one after another, row\n"
             "by row; a crosswise left one column by column, and so a right one that is not.\n"
             "`addends` is a tuple of pairs of up to two addresses of such as the result, and of\n"
             "what they are multiplied by, a float. A symmetric product is made by its half, from\n"
             "addends that are symmetric too. Nothing is read or written if any of it cannot be.\n\n"
             "What is written must not overlap with what is read, and all must hold so many.");

#if TILES
enum { PRODUCT_ARGUMENTS = 13 };

/* Take the shape of matrices, of which none may have more bytes, in panels, than can be counted. */
static int take_shape(PyObject *const *given, Product *product, int64_t *threads)
{
    const int64_t most = INT64_MAX / 256;
    int64_t symmetric, left, right;
    if (take_number(given[0], "is_symmetric", 0, 1, &symmetric) < 0 ||
        take_number(given[1], "threads", 1, INT64_MAX, threads) < 0 ||
        take_number(given[2], "batch", 0, most, &product->batch) < 0 ||
        take_number(given[3], "rows", 0, most, &product->left.rows) < 0 ||
        take_number(given[4], "columns", 0, most, &product->right.rows) < 0 ||
        take_number(given[5], "depth", 0, most, &product->depth) < 0 ||
        take_number(given[7], "left_is_crosswise", 0, 1, &left) < 0 ||
        take_number(given[9], "right_is_crosswise", 0, 1, &right) < 0)
        return -1;
    product->is_symmetric = (int)symmetric;
    product->left.is_crosswise = (int)left;
    product->right.is_crosswise = (int)right;
    const double rows = (double)product->left.rows + TILE, batch = (double)product->batch;
    const double columns = (double)product->right.rows + TILE, depth = (double)product->depth + 2;
    if (batch * rows * columns > (double)most || batch * (rows + columns) * depth > (double)most) {
        PyErr_SetString(PyExc_OverflowError, "shape: more elements than memory can hold.");
        return -1;
    }
    if (product->is_symmetric && product->left.rows != product->right.rows) {
        PyErr_Format(PyExc_ValueError, "columns=%lld: must be rows=%lld of what is symmetric.",
                     (long long)product->right.rows, (long long)product->left.rows);
        return -1;
    }
    return 0;
}

static int take_matrices(PyObject *const *given, Product *product)
{
    const int64_t rows = product->left.rows, columns = product->right.rows;
    const int64_t size = product->batch * rows * columns, each = product->batch * product->depth;
    char *left, *right, *result, *addend;
    if (take_address(given[6], 2, each * rows, &left) < 0 ||
        take_address(given[8], 2, each * columns, &right) < 0 ||
        take_address(given[10], 2, size, &result) < 0)
        return -1;
    product->left.source = (const uint16_t *)left;
    product->right.source = (const uint16_t *)right;
    product->result = (uint16_t *)result;
    product->alpha = (float)PyFloat_AsDouble(given[11]);
    const Py_ssize_t count = PyTuple_Size(given[12]);
    if (PyErr_Occurred())
        return -1;
    if (count > 2 * MOST_ADDENDS || count % 2 != 0) {
        PyErr_Format(PyExc_ValueError, "addends: must be at most %d pairs.", (int)MOST_ADDENDS);
        return -1;
    }
    product->addends = (int)count / 2;
    for (int i = 0; i < product->addends; i++) {
        if (take_address(PyTuple_GetItem(given[12], 2 * i), 2, size, &addend) < 0)
            return -1;
        product->addend[i] = (const uint16_t *)addend;
        product->factor[i] = (float)PyFloat_AsDouble(PyTuple_GetItem(given[12], 2 * i + 1));
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

static PyObject *run_product(Product *product, int64_t threads)
{
    const int is_one = product->left.source == product->right.source &&
                       product->left.rows == product->right.rows &&
                       product->left.is_crosswise == product->right.is_crosswise;
    const int64_t lefts = product->batch * size_of_panels(product, &product->left);
    const int64_t rights = is_one ? 0 : product->batch * size_of_panels(product, &product->right);
    char *memory = PyMem_Malloc((size_t)(lefts + rights) * sizeof(uint32_t) + CACHE_LINE);
    if (memory == NULL)
        return PyErr_NoMemory();
    int64_t next;
    product->next = &next;
    product->left.panels = (uint32_t *)(memory + CACHE_LINE - (uintptr_t)memory % CACHE_LINE);
    product->right.panels = product->left.panels + (is_one ? 0 : lefts);
    Py_BEGIN_ALLOW_THREADS
    multiply(product, threads);
    Py_END_ALLOW_THREADS
    PyMem_Free(memory);
    Py_RETURN_NONE;
}

static PyObject *product(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
    (void)module;
    Product own = {.by = tiles};
    int64_t threads;
    if (count != PRODUCT_ARGUMENTS || !PyTuple_Check(given[PRODUCT_ARGUMENTS - 1])) {
        PyErr_SetString(PyExc_TypeError, "product takes 12 numbers and a tuple.");
        return NULL;
    }
    if (tiles == NULL) {
        PyErr_SetString(PyExc_ValueError, "product: this processor has no instruction for it.");
        return NULL;
    }
    if (take_shape(given, &own, &threads) < 0 || take_matrices(given, &own) < 0)
        return NULL;
    return run_product(&own, threads);
}
#else
static PyObject *product(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
    (void)module, (void)given, (void)count;
    PyErr_SetString(PyExc_ValueError, "product: this processor has no instruction for it.");
    return NULL;
}
#endif
