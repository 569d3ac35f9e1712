package format

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/fusefs"
)

// serveEnv names the image that this program serves instead of running tests: a
// process that reads its own FUSE mount can wait for itself.
const serveEnv = "EROFS_OCI_TEST_FORMAT_SERVE"

func TestMain(m *testing.M) {
	if image, ok := os.LookupEnv(serveEnv); ok {
		if err := serve(image, os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func serve(image, target string) error {
	f, err := backend.OpenFile(image)
	if err != nil {
		return err
	}
	defer f.Close()
	m, err := fusefs.Backend{}.Mount(context.Background(), backend.Volume{Primary: f}, target,
		backend.Options{Name: "format", Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return m.Wait()
}

// served mounts an image by our own reader for the rest of the test.
func served(t *testing.T, image string) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], dir)
	cmd.Env = append(os.Environ(), serveEnv+"="+image)
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Wait(); err != nil {
			t.Errorf("the server: %v", err)
		}
	})
	said := bufio.NewReader(out)
	if line, err := said.ReadString('\n'); err != nil || line != "ready\n" {
		rest, _ := io.ReadAll(said)
		t.Fatalf("the server said %q and %q, %v", line, rest, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			cmd.Process.Kill()
		}
	})
	return dir
}

// mounted mounts an image by the kernel for the rest of the test.
func mounted(t *testing.T, image string) string {
	t.Helper()
	dir := t.TempDir()
	if _, err := mountFile(image, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}
