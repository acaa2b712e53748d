/* Launches of parallel loops: linked into every compiled library, in place of TVM's thread pool.

   A kernel's `T.parallel` calls through the pointer __TVMBackendParallelLaunch, a weak symbol that
   TVM's loader looks up and fills with its own pool, whose launch took twice as long. Here the symbol
   is strong and hidden: the kernels bind to it and the loader does not find it.

       launch(body):   num_task = TVM_NUM_THREADS     read each time, as TVM does
           move workers that sleep or wait on this CPU off it
           open the gate of num_task - 1 workers      each claims its share: body(1), body(2), ...
           body(0)                                    in the caller
           claim and run the shares that nobody has   of workers that are asleep or have no core
           wait at the gate `done`                    for those that have begun

   Who waits at a gate spins for SPIN_NS, so that the many short loops of a step find the workers
   awake, then lets other threads run where there are any, and after YIELD_NS sleeps. One pool a
   library, made by the first launch; a caller that finds it taken (another thread's launch, or a
   loop within a loop) runs the whole loop itself. A forked child has no workers and makes its own.
   Workers end before the library is unloaded.

   Measured: docs/log.md, "launches". */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MAX_TASKS = 256, SPIN_NS = 5000, YIELD_NS = 50000, CACHE_LINE = 64, PAUSES = 16 };
enum { MOVES_APART_NS = 1000000 };

/* TVM's c_backend_api.h: the body of a loop runs the share task_id of env->num_task. */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} Env;
typedef int (*Body)(int task_id, Env *env, void *closure);

typedef struct {
  _Alignas(CACHE_LINE) atomic_uint opened; /* how many times */
  atomic_int sleepers;
  pthread_mutex_t mutex;
  pthread_cond_t cond;
} Gate;

typedef struct {
  Gate gate;
  atomic_uint claimed; /* openings whose share has been taken, by the worker or by the caller */
  atomic_int cpu;      /* where it last passed its gate, or may be waiting to run */
  atomic_int avoids;   /* a CPU of `allowed` that it may not run on just now, or -1 */
  cpu_set_t allowed;   /* those of the thread that made it */
  int64_t moved;       /* ns, when the caller last moved it; the caller's alone */
  int task_id;
  pthread_t thread;
} Worker;

static struct {
  pthread_mutex_t taken; /* by the launch that uses the workers */
  int num_workers;
  atomic_int stop;
  /* the loop being run; written before the workers' gates open */
  Body body;
  Env env;
  void *closure;
  atomic_int running; /* shares but the caller's that have not finished */
  atomic_int failed;
  Gate done;
  Worker workers[MAX_TASKS - 1];
} pool = {.taken = PTHREAD_MUTEX_INITIALIZER,
          .done = {.mutex = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER}};

static void relax_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb"); /* `yield` returns at once on most cores */
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void init_gate(Gate *gate) {
  atomic_store(&gate->opened, 0);
  atomic_store(&gate->sleepers, 0);
  pthread_mutex_init(&gate->mutex, NULL);
  pthread_cond_init(&gate->cond, NULL);
}

static void open_gate(Gate *gate) {
  atomic_fetch_add(&gate->opened, 1);
  if (atomic_load(&gate->sleepers)) { /* counted before the sleeper looks at `opened` once more */
    pthread_mutex_lock(&gate->mutex);
    pthread_cond_broadcast(&gate->cond);
    pthread_mutex_unlock(&gate->mutex);
  }
}

/* Wait until the gate has been opened more than `passed` times; returns how many times it has. */
static unsigned pass_gate(Gate *gate, unsigned passed) {
  unsigned opened;
  int64_t start = 0;
  while ((opened = atomic_load_explicit(&gate->opened, memory_order_acquire)) == passed) {
    for (int i = 0; i < PAUSES; ++i) {
      relax_cpu();
      if (atomic_load_explicit(&gate->opened, memory_order_relaxed) != passed) break;
    }
    int64_t now = now_ns();
    if (!start) start = now;
    if (now - start < SPIN_NS) continue;
    if (now - start < YIELD_NS) {
      sched_yield();
      continue;
    }
    pthread_mutex_lock(&gate->mutex);
    atomic_fetch_add(&gate->sleepers, 1);
    while (atomic_load(&gate->opened) == passed) pthread_cond_wait(&gate->cond, &gate->mutex);
    atomic_fetch_sub(&gate->sleepers, 1);
    pthread_mutex_unlock(&gate->mutex);
  }
  return opened;
}

/* Take the share of this opening of a worker's gate; one thread can. The launch does not end before
   every share is taken and done, so that what the pool says of the loop holds for whoever has. */
static int claim(Worker *worker, unsigned opening) {
  unsigned before = opening - 1;
  return atomic_compare_exchange_strong(&worker->claimed, &before, opening);
}

/* Let a worker run anywhere but on the caller's CPU until it has passed its gate. Linux wakes it
   there even where another CPU is idle, and leaves it behind the caller for a time slice: the
   caller runs all the shares, launch after launch. */
static void move_off(Worker *worker, int cpu) {
  cpu_set_t others = worker->allowed;
  if (cpu < 0 || cpu >= CPU_SETSIZE || atomic_load(&worker->avoids) == cpu) return;
  CPU_CLR(cpu, &others);
  if (!CPU_COUNT(&others)) return;
  if (!pthread_setaffinity_np(worker->thread, sizeof others, &others))
    atomic_store(&worker->avoids, cpu);
}

/* Two changes of affinity take as long as a short launch does, and a caller that ends before its
   worker, which short shares make likely, looks like one that a worker is queued behind. */
static int may_move(Worker *worker) {
  int64_t now = now_ns();
  if (now - worker->moved < MOVES_APART_NS) return 0;
  worker->moved = now;
  return 1;
}

static void note_cpu(Worker *self) {
  if (atomic_exchange(&self->avoids, -1) >= 0)
    pthread_setaffinity_np(pthread_self(), sizeof self->allowed, &self->allowed);
  atomic_store(&self->cpu, sched_getcpu());
}

static void *work(void *argument) {
  Worker *self = argument;
  unsigned passed = 0;
  for (;;) {
    passed = pass_gate(&self->gate, passed);
    if (atomic_load(&pool.stop)) return NULL;
    note_cpu(self);
    if (!claim(self, passed)) continue; /* the caller was quicker */
    if (pool.body(self->task_id, &pool.env, pool.closure)) atomic_store(&pool.failed, 1);
    if (atomic_fetch_sub(&pool.running, 1) == 1) open_gate(&pool.done);
  }
}

/* Start workers up to `count`; fewer where the system refuses a thread. Signals are for others. */
static void start_workers(int count) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool.num_workers < count) {
    Worker *worker = &pool.workers[pool.num_workers];
    init_gate(&worker->gate);
    atomic_store(&worker->claimed, 0);
    atomic_store(&worker->cpu, sched_getcpu()); /* a new thread may be queued behind its maker */
    atomic_store(&worker->avoids, -1);
    worker->moved = INT64_MIN / 2;
    if (pthread_getaffinity_np(pthread_self(), sizeof worker->allowed, &worker->allowed))
      CPU_ZERO(&worker->allowed); /* more CPUs than a set has: it stays where it is */
    worker->task_id = pool.num_workers + 1;
    if (pthread_create(&worker->thread, NULL, work, worker)) break;
    ++pool.num_workers;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int num_threads(void) {
  const char *asked = getenv("TVM_NUM_THREADS");
  long count = asked ? strtol(asked, NULL, 10) : sysconf(_SC_NPROCESSORS_ONLN);
  return count < 1 ? 1 : count > MAX_TASKS ? MAX_TASKS : (int)count;
}

static int launch_alone(Body body, void *closure) {
  Env env = {NULL, 1};
  return body(0, &env, closure);
}

static int launch(Body body, void *closure, int num_task) {
  if (num_task <= 0) num_task = num_threads();
  if (num_task == 1 || pthread_mutex_trylock(&pool.taken)) return launch_alone(body, closure);
  if (num_task > MAX_TASKS) num_task = MAX_TASKS;
  if (num_task - 1 > pool.num_workers) start_workers(num_task - 1);
  if (num_task - 1 > pool.num_workers) num_task = pool.num_workers + 1;

  unsigned passed = atomic_load(&pool.done.opened);
  pool.body = body;
  pool.closure = closure;
  pool.env = (Env){NULL, num_task};
  atomic_store(&pool.failed, 0);
  atomic_store(&pool.running, num_task - 1);
  int cpu = sched_getcpu();
  for (int i = 0; i < num_task - 1; ++i) {
    Worker *worker = &pool.workers[i];
    int is_asleep = atomic_load(&worker->gate.sleepers);
    if ((is_asleep || atomic_load(&worker->cpu) == cpu) && may_move(worker)) move_off(worker, cpu);
    open_gate(&worker->gate);
  }
  int failed = body(0, &pool.env, closure), taken = 0;
  for (int i = num_task - 2; i >= 0; --i) { /* the last to be called is the likeliest to be late */
    Worker *worker = &pool.workers[i];
    if (!claim(worker, atomic_load(&worker->gate.opened))) continue;
    atomic_store(&worker->cpu, cpu); /* perhaps it is ready to run, behind this thread */
    failed |= body(worker->task_id, &pool.env, closure);
    ++taken;
  }
  /* Whoever finishes the last share ends the launch. Where that is a worker, its opening of the gate
     is waited for even if all is done: a late one would end the next launch before its time. */
  int by_caller = taken && atomic_fetch_sub(&pool.running, taken) == taken;
  if (num_task > 1 && !by_caller) pass_gate(&pool.done, passed);
  failed |= atomic_load(&pool.failed);
  pthread_mutex_unlock(&pool.taken);
  /* A worker's error is in the worker's thread: run the loop here to have it, or to succeed. */
  return failed ? launch_alone(body, closure) : 0;
}

static void forget_workers(void) { /* in a forked child, where they do not exist */
  pthread_mutex_init(&pool.taken, NULL);
  init_gate(&pool.done);
  pool.num_workers = 0;
}

__attribute__((constructor)) static void prepare(void) {
  pthread_atfork(NULL, NULL, forget_workers);
}

__attribute__((destructor)) static void stop_workers(void) {
  if (pthread_mutex_trylock(&pool.taken)) return; /* the process exits amid a launch */
  atomic_store(&pool.stop, 1);
  for (int i = 0; i < pool.num_workers; ++i) open_gate(&pool.workers[i].gate);
  for (int i = 0; i < pool.num_workers; ++i) pthread_join(pool.workers[i].thread, NULL);
}

__attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(Body, void *, int) = launch;
