package guest

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// A Job is a program to be run in a guest, and what it needs.
type Job struct {
	// Init is the program in ./init, built statically.
	Init string
	// Files are put into the guest's memory: path there, path here.
	Files map[string]string
	// Disks are files that the guest sees as /disks/NAME, read-only.
	Disks map[string]string
	// Argv is the program and its arguments, Env its whole environment.
	Argv, Env []string
	// Memory of the guest in MiB; 0 is 1024.
	Memory int
	// Processors of the guest; 0 is 2. One is emulated at half the cost: most of
	// what two do is to interrupt and to wait for each other.
	Processors int
}

// Instructions are what ./init reads from InstructionsFile.
type Instructions struct {
	Modules   []string
	Argv, Env []string
}

// InstructionsFile is where the instructions lie in the guest.
const InstructionsFile = "/job.json"

// ErrDied is a guest that was gone before its job had ended.
var ErrDied = errors.New("the guest ended without an exit status")

// Run boots the kernel, runs the job, and returns its exit status; what it
// prints goes to out as it comes. An error means that there is no exit status:
// the guest did not boot, crashed (ErrDied), or was ended with ctx.
func (k *Kernel) Run(ctx context.Context, job Job, out io.Writer) (exit int, err error) {
	dir, err := os.MkdirTemp("", "guest-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := k.prepare(filepath.Join(dir, "initramfs"), job); err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", k.arguments(dir, job)...)
	cmd.Stdout = out
	var said strings.Builder
	cmd.Stderr = &said
	err = runBound(cmd)
	if ctx.Err() != nil {
		return 0, fmt.Errorf("guest %s: %w\n%s", k.Package, context.Cause(ctx), tail(dir))
	}
	if err != nil {
		return 0, fmt.Errorf("qemu: %w: %s", err, said.String())
	}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return 0, err
	}
	if _, err := fmt.Sscanf(string(status), "exit %d\n", &exit); err != nil {
		return 0, fmt.Errorf("%s: %w, and said %q\n%s", k.Package, ErrDied, status, tail(dir))
	}
	return exit, nil
}

// runBound runs cmd so that it dies with this process. The kernel ties that
// death to the thread that started it, hence the lock.
func runBound(cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd.Run()
}

// prepare writes the initial file system.
func (k *Kernel) prepare(path string, job Job) error {
	files := map[string]string{"/init": job.Init}
	for name, source := range job.Files {
		files[name] = source
	}
	var todo Instructions
	for _, m := range k.Modules {
		name := "/modules/" + filepath.Base(m)
		files[name] = m
		todo.Modules = append(todo.Modules, name)
	}
	todo.Argv, todo.Env = job.Argv, job.Env
	text, err := json.Marshal(todo)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	return errors.Join(writeInitramfs(w, files, map[string]string{InstructionsFile: string(text)}), w.Flush(), f.Close())
}

// arguments are qemu's. The processor lacks cmpxchg16b: the kernel's slab allocator
// likes it, and under qemu 7.2 with a thread a processor it was seen to leave
// garbage in the flags, which is a double fault. What the kernel does against
// attackers only costs time here.
func (k *Kernel) arguments(dir string, job Job) []string {
	memory, processors := cmp.Or(job.Memory, 1024), cmp.Or(job.Processors, 2)
	args := []string{
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-smp", fmt.Sprint(processors), "-m", fmt.Sprint(memory),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
		"-kernel", k.Image, "-initrd", filepath.Join(dir, "initramfs"),
		"-append", "console=ttyS0 quiet loglevel=5 panic=-1 random.trust_cpu=on mitigations=off init_on_alloc=0",
		"-d", "cpu_reset", "-D", filepath.Join(dir, "emulator"),
		"-serial", "file:" + filepath.Join(dir, "console"),
		"-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output",
		"-serial", "file:" + filepath.Join(dir, "status"),
	}
	for name, file := range job.Disks {
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=%s,format=raw,readonly=on,file=%s", name, strings.ReplaceAll(file, ",", ",,")),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s", name, name))
	}
	return args
}

// tail is the end of what the kernel said, and of what qemu noted: a processor
// that is reset after a triple fault leaves no word on the console.
func tail(dir string) string {
	return "the kernel's last words:\n" + lastLines(filepath.Join(dir, "console"), 12) +
		"\nthe emulator's:\n" + lastLines(filepath.Join(dir, "emulator"), 4)
}

func lastLines(file string, n int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
