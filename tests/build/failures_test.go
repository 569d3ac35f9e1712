package build

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// secret is a password; no output may contain it.
const secret = "canary-9c40"

const gzipTar = "application/vnd.oci.image.layer.v1.tar+gzip"

// refuses runs build, which must fail with a line that has word in it and leave neither a file nor half of one.
func (u *user) refuses(word string, args ...string) {
	u.t.Helper()
	out := filepath.Join(u.t.TempDir(), "out.erofs")
	said := u.fails(1, append([]string{"build", "-o", out}, args...)...)
	if !strings.Contains(said, word) {
		u.t.Errorf("build %q: %q, want %q in it", args, said, word)
	}
	u.empty(filepath.Dir(out))
}

func (u *user) empty(dir string) {
	u.t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		u.t.Errorf("left in %s: %v, %v", dir, left, err)
	}
}

func compressed(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(data)
	must(t, err, w.Close())
	return b.Bytes()
}

// TestSources: what is not there, or not what it should be.
func TestSources(t *testing.T) {
	u := newUser(t)
	r := newRegistry(t, fakeregistry.Options{})
	base := filepath.Dir(u.tmp)
	write(t, filepath.Join(base, "text"), bytes.Repeat([]byte("no archive\n"), 500))
	write(t, filepath.Join(base, "short.tar"), archive(t, dir("a"), file("a/file"))[:1600])
	write(t, filepath.Join(base, "empty.tar"), nil)
	for source, word := range map[string]string{
		"./nosuch":                 "no such file",
		"oci:nosuch":               "no such file",
		"oci:.":                    "not an OCI image layout",
		"oci-archive:nosuch.tar":   "no such file",
		"docker-archive:./text":    "text",
		"oci-archive:./short.tar":  "short.tar",
		"./text":                   "text: at byte ",
		"./short.tar":              "unexpected EOF",
		r.Addr() + "/nosuch:v1":    "nosuch",
		r.Addr() + "/a/b:v1@sha25": "invalid reference format",
	} {
		t.Run(source, func(t *testing.T) {
			u := *u
			u.t = t
			u.refuses(word, source)
		})
	}
}

// TestHostileArchives: what leads out of the tree is refused, and so is what there is too much of.
func TestHostileArchives(t *testing.T) {
	u := newUser(t)
	link := func(name, target string) tar.Header {
		return tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeSymlink}
	}
	for name, c := range map[string]struct {
		headers []tar.Header
		word    string
	}{
		"dot-dot":           {[]tar.Header{file("a/../../x")}, ".. parts"},
		"absolute":          {[]tar.Header{file("/etc/passwd")}, "is absolute"},
		"through links":     {[]tar.Header{link("up", "../.."), file("up/x")}, "leads above the root"},
		"a loop":            {[]tar.Header{link("a", "b"), link("b", "a"), file("a/x")}, "symbolic links"},
		"hard link outside": {[]tar.Header{{Name: "x", Linkname: "../../etc/passwd", Typeflag: tar.TypeLink}}, ".. parts"},
		"hard link nowhere": {[]tar.Header{{Name: "x", Linkname: "nosuch", Typeflag: tar.TypeLink}}, "not there"},
		"through a file":    {[]tar.Header{file("f"), file("f/x")}, "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			u := *u
			u.t = t
			source := filepath.Join(t.TempDir(), "hostile.tar")
			write(t, source, archive(t, c.headers...))
			u.refuses(c.word, source)
		})
	}
	t.Run("bombs", func(t *testing.T) { testBombs(t) })
}

// testBombs: 64 MiB in 64 KB are refused before they are on the disk.
func testBombs(t *testing.T) {
	u := newUser(t)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Size: 64 << 20, Mode: 0o644}))
	_, err := w.Write(make([]byte, 64<<20))
	must(t, err, w.Close())
	bomb := compressed(t, b.Bytes())
	source := filepath.Join(t.TempDir(), "bomb.tar.gz")
	write(t, source, bomb)
	u.refuses("more than", "--max-size=1MiB", source)
	r := newRegistry(t, fakeregistry.Options{})
	ref := push(t, r, "bomb:v1", ocipush.Bytes(gzipTar, bomb))
	u.refuses("--tmp-limit allows more", "--tmp-limit=1MiB", ref)
	u.refuses("--max-size", "--quiet", "--max-size=1MiB", pushRight(t, r, "bomb:v2", b.Bytes()))
	before := r.Stats().ManifestPUTs
	if said := u.fails(1, "convert", "--tmp-limit=1MiB", "--quiet", ref, r.Addr()+"/converted:v1"); !strings.Contains(said, "--tmp-limit allows more") {
		t.Errorf("%q", said)
	}
	if n := r.Stats().ManifestPUTs - before; n != 0 || r.OpenUploads() != 0 {
		t.Errorf("%d manifests and %d uploads are left", n, r.OpenUploads())
	}
}

// pushRight pushes an image of one gzip layer with the right diff ID.
func pushRight(t *testing.T, r *fakeregistry.Registry, name string, data []byte) (ref string) {
	t.Helper()
	return pushWith(t, r, name, gzipTar, compressed(t, data), digest.FromBytes(data))
}

// pushWith pushes an image of one layer, of a media type, which the configuration says has a diff ID.
func pushWith(t *testing.T, r *fakeregistry.Registry, name, mediaType string, layer []byte, diffID digest.Digest) (ref string) {
	t.Helper()
	repository, _, _ := strings.Cut(name, ":")
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%q]}}`, diffID)
	for _, b := range [][]byte{config, layer} {
		r.PutBlob(repository, digest.FromBytes(b), bytes.NewReader(b), int64(len(b)))
	}
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},`+
		`"layers":[{"mediaType":%q,"digest":%q,"size":%d}]}`, manifestType, digest.FromBytes(config), len(config), mediaType, digest.FromBytes(layer), len(layer))
	_, err := ocipush.PushManifest(t.Context(), r.URL(), name, manifestType, manifest, ocipush.Options{})
	must(t, err)
	return r.Addr() + "/" + name
}

// TestWrongLayers: what is not what its digest or its diff ID says, and what cannot be read here.
func TestWrongLayers(t *testing.T) {
	u := newUser(t)
	r := newRegistry(t, fakeregistry.Options{})
	data := archive(t, dir("a"), file("a/file"))
	layer := compressed(t, data)
	substituted := compressed(t, archive(t, dir("a"), file("a/evil")))
	changed := pushRight(t, r, "changed:v1", data)
	r.PutBlob("changed", digest.FromBytes(layer), bytes.NewReader(substituted), int64(len(substituted)))
	flipped := bytes.Clone(layer)
	flipped[len(flipped)/2] ^= 1
	flippedRef := pushRight(t, r, "flipped:v1", data)
	r.PutBlob("flipped", digest.FromBytes(layer), bytes.NewReader(flipped), int64(len(flipped)))
	_, err := ocipush.PushManifest(t.Context(), r.URL(), "old:v1", "application/vnd.docker.distribution.manifest.v1+prettyjws",
		[]byte(`{"schemaVersion":1,"name":"old","tag":"v1","fsLayers":[{"blobSum":"`+digest.FromBytes(layer).String()+`"}]}`), ocipush.Options{})
	must(t, err)
	type wrong struct{ ref, word string }
	cases := map[string]wrong{
		"digest":   {changed, digest.FromBytes(layer).String()},
		"flipped":  {flippedRef, digest.FromBytes(layer).String()},
		"diff ID":  {pushWith(t, r, "diffid:v1", gzipTar, layer, digest.FromString("another")), "diff ID"},
		"schema 1": {r.Addr() + "/old:v1", "schema 1"},
	}
	for name, mediaType := range map[string]string{
		"foreign":          "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
		"nondistributable": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"encrypted":        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
	} {
		cases[name] = wrong{pushWith(t, r, name+":v1", mediaType, layer, digest.FromBytes(data)), mediaType}
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			u := *u
			u.t = t
			u.refuses(c.word, "--quiet", c.ref)
			for _, how := range []string{"--squash=true", "--squash=false"} {
				before := r.Stats().ManifestPUTs
				if said := u.fails(1, "convert", how, "--quiet", c.ref, r.Addr()+"/converted/to:v1"); !strings.Contains(said, c.word) {
					t.Errorf("convert: %q, want %q in it", said, c.word)
				}
				if n := r.Stats().ManifestPUTs - before; n != 0 || r.OpenUploads() != 0 {
					t.Errorf("convert leaves %d manifests and %d uploads", n, r.OpenUploads())
				}
			}
		})
	}
}

// TestOutput: a file that is there is not touched unless the user wants it, and one that cannot be written is said.
func TestOutput(t *testing.T) {
	u := newUser(t)
	base := filepath.Dir(u.tmp)
	source, there := filepath.Join(base, "in.tar"), filepath.Join(base, "there.erofs")
	write(t, source, archive(t, file("x")))
	write(t, there, []byte("precious"))
	if said := u.fails(1, "build", "-o", there, source); !strings.Contains(said, "is there already; --overwrite replaces it") {
		t.Errorf("%q", said)
	}
	if said := u.fails(1, "build", "--overwrite", "-o", there, "./nosuch"); !strings.Contains(said, "no such file") {
		t.Errorf("%q", said)
	}
	if now, err := os.ReadFile(there); err != nil || string(now) != "precious" {
		t.Errorf("it is now %q, %v", now, err)
	}
	for out, word := range map[string]string{base + "/nosuch/out.erofs": "no such file", base: "not a regular file", "/dev/null": "not a regular file"} {
		if said := u.fails(1, "build", "-o", out, source); !strings.Contains(said, word) {
			t.Errorf("-o %s: %q", out, said)
		}
	}
	if said := u.fails(1, "build", "--tmp", base+"/nosuch", "-o", base+"/out.erofs", source); !strings.Contains(said, "no such file") {
		t.Errorf("--tmp: %q", said)
	}
	u.must("build", "--quiet", "--overwrite", "-o", there, source)
	if got := u.paths(there); len(got) != 1 || got[0] != "x" {
		t.Errorf("%q", got)
	}
}

// noise is data that does not compress.
func noise(n int) []byte {
	data := make([]byte, 0, n+digest.SHA256.Size())
	for sum := digest.FromString("noise"); len(data) < n; sum = digest.FromString(string(sum)) {
		data = append(data, sum.Encoded()[:32]...)
	}
	return data[:n]
}

// TestFullDisk: what is in the way is said, and nothing stays.
func TestFullDisk(t *testing.T) {
	require.Has(t, "root")
	u := newUser(t)
	small := filepath.Join(filepath.Dir(u.tmp), "small")
	must(t, os.Mkdir(small, 0o755), unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { must(t, unix.Unmount(small, 0)) })
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.WriteHeader(&tar.Header{Name: "noise", Typeflag: tar.TypeReg, Size: 4 << 20, Mode: 0o644}))
	_, err := w.Write(noise(4 << 20))
	must(t, err, w.Close())
	source := filepath.Join(filepath.Dir(u.tmp), "noise.tar")
	write(t, source, b.Bytes())
	write(t, source+".gz", compressed(t, b.Bytes()))
	r := newRegistry(t, fakeregistry.Options{})
	ref := pushRight(t, r, "noise:v1", b.Bytes())
	const full = "no space left on device"
	for name, args := range map[string][]string{
		"layers": {"--tmp", small, ref}, "archive": {"--tmp", small, source + ".gz"}, "compressed": {"--tmp", small, source},
	} {
		t.Run(name, func(t *testing.T) {
			u := *u
			u.t = t
			u.refuses(full, append([]string{"--quiet"}, args...)...)
			u.refuses(small, append([]string{"--quiet"}, args...)...)
			u.refuses("--tmp names another directory", append([]string{"--quiet"}, args...)...)
			u.empty(small)
		})
	}
	for _, z := range []string{"none", "lz4"} {
		out := filepath.Join(small, "out.erofs")
		said := u.fails(1, "build", "--quiet", "-z", z, "-o", out, source)
		if !strings.Contains(said, full) || !strings.Contains(said, small) {
			t.Errorf("-z %s: %q", z, said)
		}
		u.empty(small)
	}
	if said := u.fails(1, "convert", "--quiet", "--tmp", small, ref, r.Addr()+"/converted:v1"); !strings.Contains(said, full) || !strings.Contains(said, small) {
		t.Errorf("convert: %q", said)
	}
	u.empty(small)
	// A layout on a full disk is left without what did not fit.
	layout := filepath.Join(small, "layout")
	if said := u.fails(1, "convert", "--quiet", ref, "oci:"+layout); !strings.Contains(said, full) {
		t.Errorf("convert to a layout: %q", said)
	}
	var files []string
	must(t, filepath.WalkDir(small, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if st, statErr := d.Info(); statErr != nil || st.Size() > 64<<10 {
				files = append(files, path)
			}
		}
		return err
	}))
	if len(files) > 0 {
		t.Errorf("left in the layout: %q", files)
	}
	must(t, os.RemoveAll(layout))
}

// interrupted starts the program, sends it SIGINT when ready, and wants it to end at once, by itself, and to leave
// nothing.
func (u *user) interrupted(cmd *exec.Cmd, ready func()) {
	u.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	must(u.t, cmd.Start())
	ready()
	must(u.t, cmd.Process.Signal(syscall.SIGINT))
	late := time.AfterFunc(20*time.Second, func() {
		u.t.Error("it goes on 20 seconds after SIGINT")
		_ = cmd.Process.Kill() // it may have ended by now
	})
	defer late.Stop()
	r := u.ended(cmd.Wait(), &stdout, &stderr)
	code := 1
	if cmd.Args[1] == "diff" {
		code = 2 // it cannot tell whether they differ
	}
	if r.code != code || r.stderr != "erofs-oci: interrupted\n" || r.stdout != "" {
		u.t.Errorf("%q: %+v", cmd.Args[1:], r)
	}
}

// TestInterrupted: ^C in the middle of a layer, of standard input, of an upload.
func TestInterrupted(t *testing.T) {
	data := archive(t, file("x"))
	t.Run("fetching", func(t *testing.T) {
		u := newUser(t)
		for _, command := range []string{"build", "convert", "diff"} {
			r := newRegistry(t, fakeregistry.Options{})
			ref, at := stalled(t, r, data)
			out := filepath.Join(u.t.TempDir(), "out.erofs")
			args := map[string][]string{"build": {"-o", out, ref}, "convert": {ref, r.Addr() + "/to:v1"}, "diff": {ref, filepath.Dir(out)}}[command]
			u.interrupted(u.command(append([]string{command, "--quiet"}, args...)...), func() { <-at })
			u.empty(filepath.Dir(out))
			if s := r.Stats(); s.ManifestPUTs != 1 || r.OpenUploads() != 0 { // that of the source
				t.Errorf("%s left %d manifests and %d uploads", command, s.ManifestPUTs, r.OpenUploads())
			}
		}
	})
	t.Run("compressing", func(t *testing.T) {
		u := newUser(t)
		r := newRegistry(t, fakeregistry.Options{})
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		must(t, w.WriteHeader(&tar.Header{Name: "noise", Typeflag: tar.TypeReg, Size: 48 << 20}))
		_, err := w.Write(bytes.Repeat(noise(1<<20), 48))
		must(t, err, w.Close())
		ref := pushRight(t, r, "long:v1", b.Bytes())
		out := filepath.Join(t.TempDir(), "out.erofs")
		cmd := u.command("build", "--compress=zstd,19", "--cluster-size=1MiB", "--workers=1", "-o", out, ref)
		said, err := cmd.StderrPipe()
		must(t, err, cmd.Start())
		lines := bufio.NewReader(said)
		// When the only layer is there, compression begins; it takes many seconds.
		if line, err := lines.ReadString('\n'); err != nil || !strings.HasPrefix(line, "fetch layer ") {
			t.Errorf("%q, %v", line, err)
		}
		must(t, cmd.Process.Signal(syscall.SIGINT))
		begun := time.Now()
		rest, err := io.ReadAll(lines)
		must(t, err)
		var none bytes.Buffer
		if got := u.ended(cmd.Wait(), &none, &none); got.code != 1 || string(rest) != "erofs-oci: interrupted\n" {
			t.Errorf("exit code %d: %q", got.code, rest)
		}
		if took := time.Since(begun); took > 10*time.Second {
			t.Errorf("it went on for %v", took)
		}
		u.empty(filepath.Dir(out))
	})
	t.Run("standard input", func(t *testing.T) {
		u := newUser(t)
		out := filepath.Join(t.TempDir(), "out.erofs")
		cmd := u.command("build", "--quiet", "-o", out, "-")
		stdin, w, err := os.Pipe()
		must(t, err)
		defer stdin.Close()
		defer w.Close()
		cmd.Stdin = stdin
		u.interrupted(cmd, func() {
			var b bytes.Buffer
			long := tar.NewWriter(&b)
			must(t, long.WriteHeader(&tar.Header{Name: "long", Typeflag: tar.TypeReg, Size: 64 << 20}))
			_, err := long.Write(make([]byte, 2<<20)) // more than a pipe holds: it is being read
			must(t, err)
			_, err = w.Write(b.Bytes())
			must(t, err)
		})
		u.empty(filepath.Dir(out))
	})
	t.Run("uploading", func(t *testing.T) {
		u := newUser(t)
		image := filepath.Join(t.TempDir(), "image.erofs")
		source := filepath.Join(t.TempDir(), "in.tar")
		write(t, source, data)
		u.must("build", "--quiet", "-o", image, source)
		r := newRegistry(t, fakeregistry.Options{})
		at := uploadStalls(t, r)
		u.interrupted(u.command("push", "--quiet", image, r.Addr()+"/to:v1"), func() { <-at })
		if s := r.Stats(); s.ManifestPUTs != 0 {
			t.Errorf("%d manifests were put", s.ManifestPUTs)
		}
	})
}

// stalled pushes an image whose layer never comes to its end. The channel is closed when it is being sent.
func stalled(t *testing.T, r *fakeregistry.Registry, data []byte) (ref string, at chan struct{}) {
	t.Helper()
	ref = pushRight(t, r, "stalled:v1", data)
	layer := digest.FromBytes(compressed(t, data)).String()
	at = make(chan struct{})
	stall, once := make(chan struct{}), sync.Once{}
	t.Cleanup(func() { close(stall) })
	r.SetFault(func(req *http.Request) *fakeregistry.Fault {
		if req.Method != http.MethodGet || !strings.HasSuffix(req.URL.Path, layer) {
			return nil
		}
		once.Do(func() { close(at) })
		return &fakeregistry.Fault{Stall: stall, After: 20}
	})
	return ref, at
}

// TestBrokenOff: a layer that breaks off is gone on with where it ended; no byte is fetched twice.
func TestBrokenOff(t *testing.T) {
	u := newUser(t)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.WriteHeader(&tar.Header{Name: "noise", Typeflag: tar.TypeReg, Size: 1 << 20}))
	_, err := w.Write(noise(1 << 20))
	must(t, err, w.Close())
	data := b.Bytes()
	layer := compressed(t, data)
	name := digest.FromBytes(layer).String()
	for _, command := range []string{"build", "convert"} {
		r := newRegistry(t, fakeregistry.Options{})
		ref := pushRight(t, r, "broken:v1", data)
		const first = 100_000
		broken := fakeregistry.Always(fakeregistry.Fault{Break: true, After: first}).First(2)
		r.SetFault(func(req *http.Request) *fakeregistry.Fault {
			if req.Method != http.MethodGet || !strings.HasSuffix(req.URL.Path, name) {
				return nil
			}
			return broken(req)
		})
		out := filepath.Join(t.TempDir(), "out.erofs")
		r.ResetStats()
		if command == "build" {
			u.must("build", "--quiet", "-o", out, ref)
		} else {
			u.must("convert", "--quiet", ref, r.Addr()+"/to:v1")
		}
		var ranges []string
		var sent int64
		for _, req := range r.Requests() {
			if req.Method == http.MethodGet && strings.HasSuffix(req.Path, name) {
				ranges, sent = append(ranges, req.Range), sent+req.Bytes
			}
		}
		if len(ranges) != 3 || sent != int64(len(layer)) || !strings.HasPrefix(ranges[1], "bytes=100000-") || !strings.HasPrefix(ranges[2], "bytes=200000-") {
			t.Errorf("%s: %d bytes of %d in %q", command, sent, len(layer), ranges)
		}
	}
}

// TestDead: a registry that dies in the middle of a layer is waited for no longer than the user says.
func TestDead(t *testing.T) {
	t.Run("fetching", func(t *testing.T) {
		u := newUser(t)
		r := newRegistry(t, fakeregistry.Options{})
		ref, at := stalled(t, r, archive(t, file("x")))
		out := filepath.Join(t.TempDir(), "out.erofs")
		u.dies(r, at, "build", "--quiet", "--on-error=wait:2s", "-o", out, ref)
		u.empty(filepath.Dir(out))
	})
	t.Run("uploading", func(t *testing.T) {
		u := newUser(t)
		base := filepath.Dir(u.tmp)
		write(t, filepath.Join(base, "in.tar"), archive(t, file("x")))
		u.must("build", "--quiet", "in.tar")
		r := newRegistry(t, fakeregistry.Options{})
		u.dies(r, uploadStalls(t, r), "push", "--quiet", "--on-error=wait:2s", "./in.erofs", r.Addr()+"/to:v1")
	})
}

// TestRestart: a registry that is gone for a moment in the middle of an upload is waited for.
func TestRestart(t *testing.T) {
	u := newUser(t)
	write(t, filepath.Join(filepath.Dir(u.tmp), "in.tar"), archive(t, file("x")))
	u.must("build", "--quiet", "in.tar")
	r := newRegistry(t, fakeregistry.Options{})
	at := uploadStalls(t, r)
	var out bytes.Buffer
	cmd := u.command("push", "--quiet", "./in.erofs", r.Addr()+"/to:v1")
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	<-at
	r.Stop()
	r.SetFault(nil)
	must(t, r.Start())
	if got := u.ended(cmd.Wait(), &out, &bytes.Buffer{}); got.code != 0 {
		t.Fatalf("%+v", got)
	}
	u.same("./in.erofs", r.Addr()+"/to:v1")
}

// dies runs the program, stops the registry when the channel is closed, and wants a line that names it.
func (u *user) dies(r *fakeregistry.Registry, at <-chan struct{}, args ...string) {
	u.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := u.command(args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	must(u.t, cmd.Start())
	<-at
	r.Stop()
	died := time.Now()
	got := u.ended(cmd.Wait(), &stdout, &stderr)
	if took := time.Since(died); took < time.Second || took > 15*time.Second {
		u.t.Errorf("it gave up after %v, and was told to wait for 2 s", took)
	}
	if got.code != 1 || strings.Count(got.stderr, "\n") != 1 || !strings.Contains(got.stderr, r.Addr()) || got.stdout != "" {
		u.t.Errorf("%+v", got)
	}
}

// uploadStalls has uploads come to no end. The channel is closed when the first of them is there.
func uploadStalls(t *testing.T, r *fakeregistry.Registry) <-chan struct{} {
	t.Helper()
	at, stall, once := make(chan struct{}), make(chan struct{}), sync.Once{}
	t.Cleanup(func() { close(stall) })
	r.SetFault(func(req *http.Request) *fakeregistry.Fault {
		if req.Method != http.MethodPut && req.Method != http.MethodPatch {
			return nil
		}
		once.Do(func() { close(at) })
		return &fakeregistry.Fault{Stall: stall, After: -1}
	})
	return at
}

// TestRefusedPush: a registry that wants another password, or forbids it, is said to; the password is not.
func TestRefusedPush(t *testing.T) {
	u := newUser(t)
	base := filepath.Dir(u.tmp)
	source, image := filepath.Join(base, "in.tar"), filepath.Join(base, "image.erofs")
	write(t, source, archive(t, file("x")))
	u.must("build", "--quiet", "-o", image, source)
	locked := newRegistry(t, fakeregistry.Options{Auth: fakeregistry.Basic, Username: "alice", Password: "another"})
	forbidden := newRegistry(t, fakeregistry.Options{})
	forbidden.SetFault(func(req *http.Request) *fakeregistry.Fault {
		if req.Method == http.MethodPost {
			return &fakeregistry.Fault{Status: http.StatusForbidden}
		}
		return nil
	})
	layout := "oci:" + filepath.Join(base, "layout") + ":app"
	u.must("push", "--quiet", image, layout)
	for to, word := range map[string]string{locked.Addr(): "401", forbidden.Addr(): "403"} {
		for _, args := range [][]string{{"push", "--quiet", "--username=alice", "--password-stdin", image, to + "/x:v1"},
			{"push", "--quiet", "--creds-stdin", image, to + "/x:v1"}} {
			var stdout, stderr bytes.Buffer
			cmd := u.command(args...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			cmd.Stdin = strings.NewReader(secret)
			if args[2] == "--creds-stdin" {
				cmd.Stdin = io.MultiReader(strings.NewReader("alice:"), cmd.Stdin)
			}
			r := u.ended(cmd.Run(), &stdout, &stderr)
			if r.code != 1 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, word) || strings.Contains(r.stderr+r.stdout, secret) {
				t.Errorf("%q: %+v", args, r)
			}
		}
	}
	// One password is not for two registries.
	cmd := u.command("convert", "--creds-stdin", locked.Addr()+"/x:v1", forbidden.Addr()+"/x:v1")
	cmd.Stdin = strings.NewReader("alice:" + secret)
	said, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(said), "are two") || strings.Contains(string(said), secret) {
		t.Errorf("%v: %s", err, said)
	}
}
