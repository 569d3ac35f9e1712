package start

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// program is what is run: imports, and a use of each that shows that it works.
const program = `import json, ssl, decimal, asyncio, email, http.client, sqlite3
answer = sqlite3.connect(":memory:").execute("select 6*7").fetchone()[0]
print(json.dumps({"answer": answer, "sum": str(decimal.Decimal("0.1") * 3), "ssl": ssl.HAS_TLSv1_3}))
`

// said is what the program prints.
const said = `{"answer": 42, "sum": "0.3", "ssl": true}` + "\n"

// Python runs the program in the root file system at dir, and says how long it took.
// It is an error if it says anything but what it has to.
func Python(ctx context.Context, dir string) (time.Duration, error) {
	return python(ctx, dir, (*exec.Cmd).Start)
}

// PythonOnOneCore is Python with all of it on the first of this process's cores.
func PythonOnOneCore(ctx context.Context, dir string) (time.Duration, error) {
	return python(ctx, dir, startOnOneCore)
}

func python(ctx context.Context, dir string, start func(*exec.Cmd) error) (time.Duration, error) {
	// Not SysProcAttr.Chroot: until a child has executed its program Go's runtime cannot
	// stop all its threads, and who reads that program from a mount waits for the registry
	// in this process, which the runtime may be about to stop.
	cmd := exec.CommandContext(ctx, "chroot", dir, "/usr/bin/python3", "-c", program)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C.UTF-8"}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	begin := time.Now()
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	took := time.Since(begin)
	switch {
	case err != nil:
		return 0, fmt.Errorf("python3 in %s: %w: %s", dir, err, stderr.Bytes())
	case stdout.String() != said:
		return 0, fmt.Errorf("python3 in %s says %q, want %q", dir, stdout.String(), said)
	}
	return took, nil
}

// startOnOneCore starts a command that has, with all that it starts, one core.
func startOnOneCore(cmd *exec.Cmd) error {
	started := make(chan error)
	go func() {
		// The child inherits the core from the thread that makes it. The thread is not
		// unlocked, so it ends with this goroutine and nobody else gets it.
		runtime.LockOSThread()
		started <- errors.Join(bindToOneCore(), cmd.Start())
	}()
	return <-started
}

// bindToOneCore leaves the calling thread the first of its cores.
func bindToOneCore() error {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("sched_getaffinity: %w", err)
	}
	for cpu := range len(all) * 64 {
		if all.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("sched_setaffinity: %w", err)
	}
	return nil
}
