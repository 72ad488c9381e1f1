"""What a worker does, in C++, when C++ crashes: it prints the innermost frames, and no more."""

CODE = r"""
#include <csignal>
#include <cstdio>
#include <cstring>
#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

namespace ostap_parallel_crash {

constexpr int kFrames = 12;
struct sigaction before[65];
volatile int current = 0;

void print(const char* text) {
  if (write(2, text, strlen(text)) < 0) {
  }
}

// To read names takes memory, and may hang where that is what was damaged: then this ends it.
void give_up(int) {
  signal(current, SIG_DFL);
  kill(getpid(), current);
}

int first_of(void** frames, int count, void* context) {
#if defined(__x86_64__)
  void* at = (void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  void* at = (void*)((ucontext_t*)context)->uc_mcontext.pc;
#else
  void* at = nullptr;
#endif
  for (int i = 0; i < count; i++)
    if (frames[i] == at) return i;
  return count > 2 ? 2 : 0;
}

bool print_frame(void* frame) {
  Dl_info info;
  char line[480];
  if (!dladdr(frame, &info) || !info.dli_fname) {
    print("  interpreted C++\n");
    return true;
  }
  const char* file = strrchr(info.dli_fname, '/');
  file = file ? file + 1 : info.dli_fname;
  if (strstr(file, "libCPyCppyy") || strstr(file, "libcppyy") || strstr(file, "python"))
    return false;  // the rest is told by Python
  const char* name = info.dli_sname ? info.dli_sname : "?";
  int status = 0;
  char* demangled = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  snprintf(line, sizeof line, "  %.300s in %.100s\n", demangled ? demangled : name, file);
  print(line);
  return true;
}

void report(int number, siginfo_t*, void* context) {
  current = number;
  struct sigaction alarm;
  memset(&alarm, 0, sizeof alarm);
  alarm.sa_handler = give_up;
  alarm.sa_flags = SA_NODEFER;
  sigaction(SIGALRM, &alarm, nullptr);
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGALRM);
  sigprocmask(SIG_UNBLOCK, &set, nullptr);
  struct itimerval time = {{0, 0}, {0, 500000}};
  setitimer(ITIMER_REAL, &time, nullptr);
  sigaction(number, &before[number], nullptr);
  void* frames[64];
  int count = backtrace(frames, 64);
  int first = first_of(frames, count, context);
  print("C++ stack (most recent call first):\n");
  for (int i = first; i < count && i < first + kFrames; i++)
    if (!print_frame(frames[i])) break;
  raise(number);
}

void install() {
  void* frames[2];
  backtrace(frames, 2);  // loads what it needs, which takes memory
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = report;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
    sigaction(number, &action, &before[number]);
}

}  // namespace ostap_parallel_crash
"""
