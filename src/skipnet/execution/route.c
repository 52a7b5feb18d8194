/* Route: a whole routed network as one operator of ONNX Runtime.
 *
 * ONNX Runtime's `If` costs about 6 microseconds a block and copies the features of a skipped block;
 * a recurrent gate made of its operators costs 12 more. Here the loop over the blocks is a small
 * program in C: it calls ONNX Runtime's own kernels (convolutions in its blocked layout and so on)
 * for the blocks that run, computes the gates itself, and steps over the blocks that do not. A
 * skipped block costs its gate, and nothing is copied.
 *
 * The program is made by `optimized.py`, which also documents its instructions; it is never read
 * from a file. One call runs one image; calls may come from several threads.
 *
 * ONNX Runtime's C interface is a table of functions whose order never changes. What is used of it
 * is declared here by position, so that no header is needed: `API_VERSION` 16, ONNX Runtime 1.16.
 */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API_VERSION 16

typedef struct Status Status;   /* OrtStatus; NULL is success. */
typedef struct Value Value;     /* OrtValue: a tensor. */
typedef struct Info Info;       /* OrtKernelInfo: what an operator knows when it is made. */
typedef struct Context Context; /* OrtKernelContext: inputs and outputs of one call. */
typedef struct Op Op;           /* OrtOp: a kernel that can be invoked by itself. */
typedef struct Attribute Attribute;
typedef struct Memory Memory;
typedef struct {
  void *const *(*get_api)(uint32_t version);
  const char *(*version)(void);
} ApiBase;

static void *const *api;

#define FUNCTION(name, position, result, ...) \
  static inline result (*name(void))(__VA_ARGS__) { return (result(*)(__VA_ARGS__))api[position]; }

FUNCTION(create_status, 0, Status *, int code, const char *message)
FUNCTION(create_domain, 26, Status *, const char *name, void **domain)
FUNCTION(domain_add, 27, Status *, void *domain, const void *op)
FUNCTION(add_domain, 28, Status *, void *session_options, void *domain)
FUNCTION(create_tensor, 49, Status *, const Memory *memory, void *data, size_t bytes,
         const int64_t *shape, size_t rank, int type, Value **value)
FUNCTION(tensor_data, 51, Status *, const Value *value, void **data)
FUNCTION(cpu_memory, 69, Status *, int allocator, int kind, Memory **memory)
FUNCTION(info_string, 87, Status *, const Info *info, const char *name, char *text, size_t *size)
FUNCTION(context_input, 90, Status *, const Context *context, size_t index, const Value **value)
FUNCTION(context_output, 91, Status *, Context *context, size_t index, const int64_t *shape,
         size_t rank, Value **value)
FUNCTION(release_status, 93, void, Status *status)
FUNCTION(release_memory, 94, void, Memory *memory)
FUNCTION(release_value, 96, void, Value *value)
FUNCTION(info_ints, 163, Status *, const Info *info, const char *name, int64_t *values, size_t *size)
FUNCTION(create_attribute, 211, Status *, const char *name, const void *data, int length, int type,
         Attribute **attribute)
FUNCTION(release_attribute, 212, void, Attribute *attribute)
FUNCTION(create_op, 213, Status *, const Info *info, const char *name, const char *domain,
         int version, const char **constraints, const int *types, int num_constraints,
         const Attribute *const *attributes, int num_attributes, int num_inputs, int num_outputs,
         Op **op)
FUNCTION(invoke, 214, Status *, const Context *context, const Op *op, const Value *const *inputs,
         int num_inputs, Value *const *outputs, int num_outputs)
FUNCTION(release_op, 215, void, Op *op)
FUNCTION(constant_input, 249, Status *, const Info *info, size_t index, int *is_constant,
         const Value **value)

enum { TYPE_FLOAT = 1, TYPE_BOOL = 9 };                                     /* of tensors */
enum { ATTRIBUTE_INT = 1, ATTRIBUTE_INTS, ATTRIBUTE_FLOAT, ATTRIBUTE_FLOATS, ATTRIBUTE_STRING };
enum { FAIL = 1 };                                                          /* status code */

/* Instructions; see optimized.py. */
enum { END, RUN, SWAP, LSTM, LOGIT, BRANCH, JUMP };

enum { MAX_INPUTS = 16, MAX_ATTRIBUTES = 32, MAX_INTS = 64, MAX_HIDDEN = 256, NAME = 128 };

#define TRY(call)                  \
  do {                             \
    Status *status_ = (call);      \
    if (status_) return status_;   \
  } while (0)

static Status *fail(const char *message) { return create_status()(FAIL, message); }

/* Memory of one call. The tensors of a slot are made once and used again. */
typedef struct Workspace {
  struct Workspace *next;
  Value **tensors; /* one a slot, */
  float **data;    /* where its numbers are, */
  float **owned;   /* and the same before any SWAP. */
  float *hidden, *cell;
} Workspace;

typedef struct {
  int64_t *program, *slots;
  int num_slots, num_constants, num_gates, num_classes, num_hidden, input, output, num_ops;
  int64_t input_floats;
  Op **ops;
  const Value **constants;
  const float **constant_data;
  Memory *memory;
  pthread_mutex_t lock;
  Workspace *idle;
} Kernel;

/* ---- making the operator ---- */

static Status *read_ints(const Info *info, const char *name, int64_t **values, size_t *size) {
  *size = 0;
  Status *status = info_ints()(info, name, NULL, size);
  if (status) release_status()(status); /* Says "too small"; the size is there. */
  *values = malloc((*size + 1) * sizeof(int64_t));
  if (!*values) return fail("out of memory");
  return info_ints()(info, name, *values, size);
}

/* One operator a paragraph: "name domain version attributes inputs outputs constraints", a line
   "name kind value…" for each attribute (i, I, f, F or s), a line "name type" for each constraint. */
static Status *read_ops(Kernel *kernel, const Info *info) {
  size_t size = 0;
  Status *status = info_string()(info, "operators", NULL, &size);
  if (status) release_status()(status);
  char *text = malloc(size + 1), *rest = NULL;
  if (!text) return fail("out of memory");
  status = info_string()(info, "operators", text, &size);
  if (status) goto done;
  text[size] = 0;
  char *line = strtok_r(text, "\n", &rest);
  kernel->ops = calloc(kernel->num_ops + 1, sizeof(Op *));
  if (!kernel->ops) status = fail("out of memory");
  for (int i = 0; i < kernel->num_ops && !status; i++) {
    char name[NAME], domain[NAME], constraints[4][NAME];
    const char *names[4];
    int types[4], version, num_attributes, num_inputs, num_outputs, num_constraints, made = 0;
    Attribute *attributes[MAX_ATTRIBUTES];
    if (!line || sscanf(line, "%127s %127s %d %d %d %d %d", name, domain, &version, &num_attributes,
                        &num_inputs, &num_outputs, &num_constraints) != 7 ||
        num_attributes > MAX_ATTRIBUTES || num_inputs > MAX_INPUTS || num_outputs != 1 ||
        num_constraints > 4) {
      status = fail("an operator this program cannot describe");
      break;
    }
    if (!strcmp(domain, "-")) domain[0] = 0;
    for (; made < num_attributes && !status; made++) {
      char key[NAME], kind = 0, word[NAME];
      int used = 0;
      line = strtok_r(NULL, "\n", &rest);
      if (!line || sscanf(line, "%127s %c%n", key, &kind, &used) != 2) {
        status = fail("an attribute this program cannot read");
        break;
      }
      line += used;
      if (kind == 's') {
        word[0] = 0;
        sscanf(line, "%127s", word);
        status = create_attribute()(key, word, strlen(word), ATTRIBUTE_STRING, &attributes[made]);
      } else if (kind == 'f' || kind == 'F') {
        float values[MAX_INTS];
        int count = 0;
        for (char *end; count < MAX_INTS; line = end) {
          int32_t bits = strtoll(line, &end, 10); /* As text it would depend on the locale. */
          if (end == line) break;
          memcpy(&values[count++], &bits, sizeof bits);
        }
        if (*line) {
          status = fail("an attribute of more numbers than this program has room for");
          break;
        }
        status = create_attribute()(key, values, count,
                                    kind == 'f' ? ATTRIBUTE_FLOAT : ATTRIBUTE_FLOATS,
                                    &attributes[made]);
      } else {
        int64_t values[MAX_INTS];
        int count = 0;
        for (char *end; count < MAX_INTS; line = end) {
          values[count] = strtoll(line, &end, 10);
          if (end == line) break;
          count++;
        }
        if (*line) {
          status = fail("an attribute of more numbers than this program has room for");
          break;
        }
        status = create_attribute()(key, values, count,
                                    kind == 'i' ? ATTRIBUTE_INT : ATTRIBUTE_INTS, &attributes[made]);
      }
      if (status) break;
    }
    for (int c = 0; c < num_constraints && !status; c++) {
      line = strtok_r(NULL, "\n", &rest);
      if (!line || sscanf(line, "%127s %d", constraints[c], &types[c]) != 2)
        status = fail("a type constraint this program cannot read");
      names[c] = constraints[c];
    }
    if (!status)
      status = create_op()(info, name, domain, version, names, types, num_constraints,
                           (const Attribute *const *)attributes, num_attributes, num_inputs,
                           num_outputs, &kernel->ops[i]);
    while (made-- > 0) release_attribute()(attributes[made]);
    line = strtok_r(NULL, "\n", &rest);
  }
done:
  free(text);
  return status;
}

static Status *read_constants(Kernel *kernel, const Info *info) {
  kernel->constants = calloc(kernel->num_constants + 1, sizeof(Value *));
  kernel->constant_data = calloc(kernel->num_constants + 1, sizeof(float *));
  if (!kernel->constants || !kernel->constant_data) return fail("out of memory");
  for (int i = 0; i < kernel->num_constants; i++) {
    int is_constant = 0;
    TRY(constant_input()(info, i + 2, &is_constant, &kernel->constants[i])); /* after the inputs */
    if (!is_constant) return fail("a weight is not constant");
    TRY(tensor_data()(kernel->constants[i], (void **)&kernel->constant_data[i]));
  }
  return NULL;
}

static void destroy_workspace(Kernel *kernel, Workspace *work) {
  for (int i = 0; i < kernel->num_slots; i++) {
    if (work->tensors && work->tensors[i]) release_value()(work->tensors[i]);
    if (work->owned) free(work->owned[i]);
  }
  free(work->tensors);
  free(work->data);
  free(work->owned);
  free(work->hidden);
  free(work->cell);
  free(work);
}

static void destroy(void *pointer) {
  Kernel *kernel = pointer;
  while (kernel->idle) {
    Workspace *work = kernel->idle;
    kernel->idle = work->next;
    destroy_workspace(kernel, work);
  }
  for (int i = 0; kernel->ops && i < kernel->num_ops; i++)
    if (kernel->ops[i]) release_op()(kernel->ops[i]);
  if (kernel->memory) release_memory()(kernel->memory);
  pthread_mutex_destroy(&kernel->lock);
  free(kernel->ops);
  free(kernel->constants);
  free(kernel->constant_data);
  free(kernel->program);
  free(kernel->slots);
  free(kernel);
}

static Status *fill(Kernel *kernel, const Info *info) {
  size_t size;
  int64_t *counts = NULL;
  TRY(read_ints(info, "program", &kernel->program, &size));
  TRY(read_ints(info, "slots", &kernel->slots, &size));
  Status *status = read_ints(info, "counts", &counts, &size);
  if (!status && size != 9) status = fail("not nine counts");
  if (status) {
    free(counts);
    return status;
  }
  kernel->num_slots = counts[0];
  kernel->num_constants = counts[1];
  kernel->num_ops = counts[2];
  kernel->num_gates = counts[3];
  kernel->num_classes = counts[4];
  kernel->num_hidden = counts[5];
  kernel->input = counts[6];
  kernel->output = counts[7];
  kernel->input_floats = counts[8];
  free(counts);
  if (kernel->num_hidden > MAX_HIDDEN) return fail("more hidden units than this program has room for");
  TRY(cpu_memory()(1, 0, &kernel->memory));
  TRY(read_ops(kernel, info));
  return read_constants(kernel, info);
}

static Status *create(const void *op, const void *unused, const Info *info, void **made) {
  (void)op, (void)unused;
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return fail("out of memory");
  pthread_mutex_init(&kernel->lock, NULL);
  Status *status = fill(kernel, info);
  if (status) {
    destroy(kernel);
    return status;
  }
  *made = kernel;
  return NULL;
}

/* ---- running ---- */

static Status *create_workspace(Kernel *kernel, Workspace **made) {
  Workspace *work = calloc(1, sizeof *work);
  if (!work) return fail("out of memory");
  work->tensors = calloc(kernel->num_slots, sizeof(Value *));
  work->data = calloc(kernel->num_slots, sizeof(float *));
  work->owned = calloc(kernel->num_slots, sizeof(float *));
  work->hidden = calloc(MAX_HIDDEN, sizeof(float));
  work->cell = calloc(MAX_HIDDEN, sizeof(float));
  Status *status = NULL;
  if (!work->tensors || !work->data || !work->owned || !work->hidden || !work->cell)
    status = fail("out of memory");
  const int64_t *slot = kernel->slots;
  for (int i = 0; i < kernel->num_slots && !status; i++) {
    size_t rank = *slot++, bytes = sizeof(float);
    for (size_t d = 0; d < rank; d++) bytes *= slot[d];
    work->data[i] = work->owned[i] = aligned_alloc(64, (bytes + 63) / 64 * 64);
    status = work->data[i] ? create_tensor()(kernel->memory, work->data[i], bytes, slot, rank,
                                             TYPE_FLOAT, &work->tensors[i])
                           : fail("out of memory");
    slot += rank;
  }
  if (status) {
    destroy_workspace(kernel, work);
    return status;
  }
  *made = work;
  return NULL;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* One step of an LSTM, gates in ONNX's order (input, output, forget, cell), and a linear to one
   logit. Weights are [inputs, 4 * hidden]: the inner loops run over outputs, side by side. */
static float lstm(Workspace *work, int hidden, const float *x, int width, const float *weight,
                  const float *bias, const float *recurrent, const float *project) {
  float z[4 * MAX_HIDDEN], logit = 0;
  const int size = 4 * hidden;
  memcpy(z, bias, size * sizeof(float));
  for (int i = 0; i < width; i++)
    for (int j = 0; j < size; j++) z[j] += x[i] * weight[i * size + j];
  for (int i = 0; i < hidden; i++)
    for (int j = 0; j < size; j++) z[j] += work->hidden[i] * recurrent[i * size + j];
  for (int j = 0; j < hidden; j++) {
    float cell = sigmoid(z[2 * hidden + j]) * work->cell[j] + sigmoid(z[j]) * tanhf(z[3 * hidden + j]);
    work->cell[j] = cell;
    work->hidden[j] = sigmoid(z[hidden + j]) * tanhf(cell);
    logit += work->hidden[j] * project[j];
  }
  return logit;
}

static Status *run(Kernel *kernel, Workspace *work, const Context *context, const float *thresholds,
                   uint8_t *decisions) {
  const int64_t *p = kernel->program;
  float logit = 0;
  memset(work->hidden, 0, kernel->num_hidden * sizeof(float));
  memset(work->cell, 0, kernel->num_hidden * sizeof(float));
  for (;;) switch (*p++) {
      case END:
        return NULL;
      case RUN: {
        const Op *op = kernel->ops[*p++];
        const Value *inputs[MAX_INPUTS];
        int count = *p++;
        for (int i = 0; i < count; i++, p++)
          inputs[i] = *p >= 0 ? work->tensors[*p] : *p == -1 ? NULL : kernel->constants[-2 - *p];
        TRY(invoke()(context, op, inputs, count, &work->tensors[*p++], 1));
        break;
      }
      case SWAP: {
        int64_t a = *p++, b = *p++;
        Value *tensor = work->tensors[a];
        float *data = work->data[a];
        work->tensors[a] = work->tensors[b], work->tensors[b] = tensor;
        work->data[a] = work->data[b], work->data[b] = data;
        break;
      }
      case LSTM: {
        const float *const *constant = kernel->constant_data;
        logit = lstm(work, kernel->num_hidden, work->data[p[0]], p[1], constant[p[2]],
                     constant[p[3]], constant[p[4]], constant[p[5]]);
        p += 6;
        break;
      }
      case LOGIT:
        logit = work->data[*p++][0];
        break;
      case BRANCH: {
        int64_t gate = *p++, target = *p++;
        decisions[gate] = logit > thresholds[gate];
        if (!decisions[gate]) p = kernel->program + target;
        break;
      }
      case JUMP:
        p = kernel->program + *p;
        break;
      default:
        return fail("an unknown instruction");
    }
}

static Status *compute(void *pointer, Context *context) {
  Kernel *kernel = pointer;
  const Value *image, *threshold;
  Value *logits, *decisions;
  void *from, *thresholds, *to, *decided;
  int64_t logits_shape[2] = {1, kernel->num_classes}, decisions_shape[2] = {1, kernel->num_gates};
  TRY(context_input()(context, 0, &image));
  TRY(context_input()(context, 1, &threshold));
  TRY(context_output()(context, 0, logits_shape, 2, &logits));
  TRY(context_output()(context, 1, decisions_shape, 2, &decisions));
  TRY(tensor_data()(image, &from));
  TRY(tensor_data()(threshold, &thresholds));
  TRY(tensor_data()(logits, &to));
  TRY(tensor_data()(decisions, &decided));

  pthread_mutex_lock(&kernel->lock);
  Workspace *work = kernel->idle;
  if (work) kernel->idle = work->next;
  pthread_mutex_unlock(&kernel->lock);
  if (!work) TRY(create_workspace(kernel, &work));

  memcpy(work->data[kernel->input], from, kernel->input_floats * sizeof(float));
  Status *status = run(kernel, work, context, thresholds, decided);
  if (!status) memcpy(to, work->data[kernel->output], kernel->num_classes * sizeof(float));

  pthread_mutex_lock(&kernel->lock);
  work->next = kernel->idle;
  kernel->idle = work;
  pthread_mutex_unlock(&kernel->lock);
  return status;
}

/* ---- what ONNX Runtime asks about the operator ---- */

static const char *name(const void *op) { return (void)op, "Route"; }
static const char *provider(const void *op) { return (void)op, NULL; /* the CPU's */ }
static size_t num_inputs(const void *op) { return (void)op, 3; }
static size_t num_outputs(const void *op) { return (void)op, 2; }
/* images and thresholds, then weights of any type */
static int input_type(const void *op, size_t i) { return (void)op, i < 2 ? TYPE_FLOAT : 0; }
static int output_type(const void *op, size_t i) { return (void)op, i == 0 ? TYPE_FLOAT : TYPE_BOOL; }
static int input_kind(const void *op, size_t i) { return (void)op, i < 2 ? 0 : 2 /* variadic */; }
static int output_kind(const void *op, size_t i) { return (void)op, (void)i, 0; }
static int memory_type(const void *op, size_t i) { return (void)op, (void)i, 0; }
static int arity(const void *op) { return (void)op, 1; }
static int mixed(const void *op) { return (void)op, 0; }

static const struct {
  uint32_t version;
  void *functions[25];
} route = {API_VERSION,
           {NULL, name, provider, input_type, num_inputs, output_type, num_outputs, NULL, destroy,
            input_kind, output_kind, memory_type, arity, mixed, arity, mixed, create, compute}};

__attribute__((visibility("default"))) Status *RegisterCustomOps(void *options,
                                                                 const ApiBase *base) {
  void *domain;
  api = base->get_api(API_VERSION);
  if (!api) return NULL; /* Older than we know: the model will not find its operator. */
  TRY(create_domain()("skipnet", &domain));
  TRY(domain_add()(domain, &route));
  return add_domain()(options, domain);
}
