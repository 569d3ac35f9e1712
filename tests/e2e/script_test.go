package e2e

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/layered"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// secret is the password of the scripts' registry; no output may contain it.
const secret = "canary-5f1d"

// TestMessages runs the scripts that mount nothing.
func TestMessages(t *testing.T) { runScripts(t, filepath.Join("testdata", "messages")) }

// TestMounts runs the scripts that mount.
func TestMounts(t *testing.T) {
	require.Has(t, "root", "fuse")
	runScripts(t, filepath.Join("testdata", "mounts"))
}

// runScripts runs each script of dir with two registries of its own: $REGISTRY,
// open to all, and $LOCKED, which wants alice and her password. Both hold the
// images of pushScriptImages.
func runScripts(t *testing.T, dir string) {
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", filepath.Dir(binary)+":"+os.Getenv("PATH"))
			for _, name := range []string{"run", "cache", "home"} {
				if err := os.Mkdir(filepath.Join(env.WorkDir, name), 0o700); err != nil {
					return err
				}
			}
			env.Setenv("EROFS_OCI_RUN_DIR", filepath.Join(env.WorkDir, "run"))
			env.Setenv("XDG_CACHE_HOME", filepath.Join(env.WorkDir, "cache"))
			env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
			env.Setenv("SECRET", secret)
			env.Setenv("EROFS_OCI_BACKEND", "fuse")
			if err := writeScriptImages(t, env); err != nil {
				return err
			}
			open, err := startRegistry(t, env, fakeregistry.Options{}, "")
			if err != nil {
				return err
			}
			env.Setenv("REGISTRY", open)
			locked, err := startRegistry(t, env, fakeregistry.Options{Auth: fakeregistry.Basic, Username: "alice", Password: secret},
				"Basic YWxpY2U6Y2FuYXJ5LTVmMWQ=")
			env.Setenv("LOCKED", locked)
			return err
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// exits N PROGRAM ARG... runs a program that must end with exit code N.
			"exits": exits,
			// expand FILE replaces the variables in a file.
			"expand": func(ts *testscript.TestScript, _ bool, args []string) {
				text := os.Expand(ts.ReadFile(args[0]), ts.Getenv)
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o600))
			},
			// awaitempty DIR waits until nothing is left in a directory.
			"awaitempty": func(ts *testscript.TestScript, _ bool, args []string) {
				dir := ts.MkAbs(args[0])
				ts.Check(awaitDir(dir, "empty", func() bool { return isEmpty(dir) }))
			},
			// oneline FILE wants exactly one line in stdout or stderr.
			"oneline": func(ts *testscript.TestScript, _ bool, args []string) {
				if s := ts.ReadFile(args[0]); strings.Count(s, "\n") != 1 {
					ts.Fatalf("%s is not one line: %q", args[0], s)
				}
			},
		},
	})
}

// writeScriptImages puts two images into the directory of a script: $IMAGE, which is
// that of rootfs:v1 and has $DIGEST, and $DEVIMAGE with its extra device $BLOB.
func writeScriptImages(t *testing.T, env *testscript.Env) error {
	plain, multi := corpus.Get(t, "plain"), corpus.Get(t, "multidev")
	env.Setenv("DIGEST", digest.FromBytes(plain.Data).String())
	for name, file := range map[string]struct {
		name string
		data []byte
	}{"IMAGE": {"image.erofs", plain.Data}, "DEVIMAGE": {"multi.erofs", multi.Data}, "BLOB": {"multi.blob", multi.Blob}} {
		env.Setenv(name, file.name)
		if err := os.WriteFile(filepath.Join(env.WorkDir, file.name), file.data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits N PROGRAM ARG...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != args[0] {
		ts.Fatalf("%q ended with %s, want %s", args[1:], got, args[0])
	}
}

func startRegistry(t *testing.T, env *testscript.Env, o fakeregistry.Options, authorization string) (string, error) {
	r, err := fakeregistry.New(o)
	if err != nil {
		return "", err
	}
	env.Defer(func() { r.Close() })
	return r.Addr(), pushScriptImages(t, r.URL(), ocipush.Options{Authorization: authorization})
}

func scriptLayers() layered.Stack {
	root := layered.Dir(".", 0o755)
	return layered.Stack{
		{root, layered.File("lower", "lower"), layered.File("both", "lower"), layered.File("removed", "gone")},
		{root, layered.File("upper", "upper"), layered.File("both", "upper"), layered.Removed("removed")},
	}
}

const tarLayer = "application/vnd.oci.image.layer.v1.tar+gzip"

// pushScriptImages fills a registry:
//
//	rootfs:v1    one EROFS layer
//	tar:v1       one tar layer
//	mixed:v1     a tar layer, then two EROFS layers
//	fake:v1      an EROFS layer whose bytes are not EROFS
//	layers:v1    two EROFS layers, the upper of which changes the lower
//	device:v1    a layer that is the next one's extra device
//	halffake:v1  two layers, the upper of which is not EROFS
//	multi:v1     an index: linux/amd64, linux/arm64, linux/arm/v7
func pushScriptImages(t *testing.T, url string, o ocipush.Options) error {
	plain := ocipush.Bytes(registry.MediaTypeErofs, corpus.Get(t, "plain").Data)
	lz4 := ocipush.Bytes(registry.MediaTypeErofs, corpus.Get(t, "lz4").Data)
	tar := ocipush.Bytes(tarLayer, []byte("not really a tar"))
	fake := ocipush.Bytes(registry.MediaTypeErofs, bytes.Repeat([]byte("no erofs "), 1000))
	ctx := context.Background()
	var two []ocipush.Layer
	for _, im := range scriptLayers().Layers(t, mkerofs.Options{}) {
		two = append(two, ocipush.Bytes(registry.MediaTypeErofs, im))
	}
	device := plain
	device.Annotations = map[string]string{"org.erofs.role": "device"}
	for name, layers := range map[string][]ocipush.Layer{
		"rootfs:v1": {plain},
		"tar:v1":    {tar},
		"mixed:v1":  {tar, plain, lz4},
		"fake:v1":   {fake},
		"layers:v1": two, "device:v1": {device, lz4}, "halffake:v1": {plain, fake},
	} {
		if _, err := ocipush.Push(ctx, url, name, layers, o); err != nil {
			return err
		}
	}
	platform := func(arch, variant string, l ocipush.Layer) ocipush.Image {
		return ocipush.Image{Layers: []ocipush.Layer{l}, Platform: ocispec.Platform{OS: "linux", Architecture: arch, Variant: variant}}
	}
	_, err := ocipush.PushIndex(ctx, url, "multi:v1",
		[]ocipush.Image{platform("amd64", "", plain), platform("arm64", "", lz4), platform("arm", "v7", tar)}, o)
	return err
}
