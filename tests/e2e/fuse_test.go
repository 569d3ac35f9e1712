package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/corpus"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// fuseScript is what somebody may have written for erofsfuse. It is run in a
// directory with the images and an empty directory mnt. Each step prints what can
// be seen, but for what a mount table says beyond source and type.
const fuseScript = `
show() { # show WHAT COMMAND...: does it succeed, and what is mounted then?
	what=$1; shift
	if "$@" >said 2>&1; then echo "$what: done"; else echo "$what: failed"; fi
	awk -v dir="$PWD/mnt" '$2 == dir { print "  " $1, $3 }' /proc/mounts
	if mountpoint -q mnt; then
		(cd mnt && find . -type f -exec cksum {} + | LC_ALL=C sort) | cksum
		umount mnt
	fi
}
show plain           erofsfuse zstd.erofs mnt
show options-last    erofsfuse zstd.erofs mnt -s -o ro,noatime
show options-first   erofsfuse -oro,allow_other -s --dbglevel=3 zstd.erofs mnt
show names           erofsfuse -o fsname=an-image,subtype=archive zstd.erofs mnt
show rw              erofsfuse -o rw,suid,dev zstd.erofs mnt
show device          erofsfuse --device=multidev.blob multidev.erofs mnt
show offset          erofsfuse --offset=12288 behind mnt
show no-image        erofsfuse nosuch.erofs mnt
show no-directory    erofsfuse zstd.erofs nosuch
show not-erofs       erofsfuse behind mnt
show wrong-offset    erofsfuse --offset=4096 behind mnt
show unknown-flag    erofsfuse --nosuch zstd.erofs mnt </dev/null
show unknown-option  erofsfuse -o nosuch zstd.erofs mnt
show no-arguments    erofsfuse
show one-argument    erofsfuse zstd.erofs
show three-arguments erofsfuse zstd.erofs mnt extra

# In the foreground it ends with the mount, or with a signal.
for how in 'umount mnt' 'kill -TERM $pid'; do
	erofsfuse -f zstd.erofs mnt >said 2>&1 &
	pid=$!
	until mountpoint -q mnt; do kill -0 $pid || exit 1; done
	eval "$how"
	wait $pid
	echo "foreground, $how: ended"
	mountpoint -q mnt && echo still mounted
done
true
`

// fuseShows is what the script says with erofsfuse 1.9.4, where SUM stands for what
// is in the images' files, but that erofsfuse ends with 0 after it found an option
// that it does not know.
const fuseShows = `plain: done
  erofsfuse fuse.erofsfuse
SUM
options-last: done
  erofsfuse fuse.erofsfuse
SUM
options-first: done
  erofsfuse fuse.erofsfuse
SUM
names: done
  an-image fuse.archive
SUM
rw: done
  erofsfuse fuse.erofsfuse
SUM
device: done
  erofsfuse fuse.erofsfuse
SUM
offset: done
  erofsfuse fuse.erofsfuse
SUM
no-image: failed
no-directory: failed
not-erofs: failed
wrong-offset: failed
unknown-flag: failed
unknown-option: failed
no-arguments: failed
one-argument: failed
three-arguments: failed
foreground, umount mnt: ended
foreground, kill -TERM $pid: ended
`

// TestFuseCommand: a script for erofsfuse sees the same with us in its place, and
// with erofsfuse itself where that is installed.
func TestFuseCommand(t *testing.T) {
	require.Has(t, "root", "fuse")
	programs := map[string]string{"erofs-oci": binary}
	if real, err := exec.LookPath("erofsfuse"); err == nil {
		programs["erofsfuse"] = real
	}
	for name, path := range programs {
		t.Run(name, func(t *testing.T) {
			s := newSession(t)
			for _, image := range []string{"zstd", "multidev"} {
				s.writeImage(corpus.Get(t, image))
			}
			bin := filepath.Join(s.dir, "bin")
			must(t, os.Mkdir(bin, 0o755))
			must(t, os.Symlink(path, filepath.Join(bin, "erofsfuse")))
			s.env = append(s.env, "PATH="+bin+":"+os.Getenv("PATH"))
			must(t, os.WriteFile(filepath.Join(s.dir, "behind"), append(make([]byte, 12288), corpus.Get(t, "zstd").Data...), 0o644))
			must(t, os.Mkdir(filepath.Join(s.dir, "mnt"), 0o755))
			r := s.run("sh", "-c", fuseScript)
			if r.code != 0 || r.stderr != "" {
				t.Errorf("exit code %d, %s", r.code, r.stderr)
			}
			want := strings.ReplaceAll(fuseShows, "SUM", contentSum(t, s.dir))
			if name == "erofsfuse" {
				for _, unknown := range []string{"unknown-flag", "unknown-option"} {
					r.stdout = strings.Replace(r.stdout, unknown+": done", unknown+": failed", 1)
				}
			}
			if r.stdout != want {
				t.Errorf("the script says\n%swant\n%s", r.stdout, want)
			}
		})
	}
}

// contentSum is the script's sum of what is in the files of an image of the corpus,
// which is the same in all of them, by way of the kernel's erofs.
func contentSum(t *testing.T, dir string) string {
	t.Helper()
	cmd := exec.Command("sh", "-c", `find . -type f -exec cksum {} + | LC_ALL=C sort | cksum`)
	cmd.Dir = kernelMount(t, filepath.Join(dir, "zstd.erofs"))
	sum, err := cmd.Output()
	must(t, err)
	return strings.TrimSpace(string(sum))
}

// TestFuseCommandListed: a mount of the fuse command is known like others.
func TestFuseCommandListed(t *testing.T) {
	require.Has(t, "root", "fuse")
	s := newSession(t)
	im := corpus.Get(t, "multidev")
	image, devices := s.writeImage(im)
	dir := s.target()
	s.must("fuse", filepath.Base(image), dir, devices[0], "-o", `fsname=a\,b,nosuid,max_read=65536,kernel_cache`)
	showsListing(t, im, dir)
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	if want := "a,b " + dir + " fuse.erofsfuse ro,nosuid,nodev,relatime,user_id=0,group_id=0,max_read=65536 "; !strings.Contains(string(mounts), want) {
		t.Errorf("want %q in\n%s", want, mounts)
	}
	if e := s.entry(dir); e.State != "running" || e.Backend != "fuse" {
		t.Errorf("listed as %+v", e)
	}
	server := s.pidfd(dir)
	s.must("umount", dir)
	awaitEnd(t, server)
	s.nothingLeft(dir)
}

// TestFuseCommandAsUser: who mounts an image may read all of it, as with erofsfuse,
// unless the kernel is told to heed modes. The root directory of the image is
// root's alone.
func TestFuseCommandAsUser(t *testing.T) {
	require.Has(t, "fusermount3")
	s := newSession(t)
	im := corpus.Get(t, "zstd")
	image, _ := s.writeImage(im)
	s.asNobody()
	count := func(options ...string) int {
		dir := s.nobodysTarget()
		s.must(append(append([]string{"fuse"}, options...), image, dir)...)
		found := s.run("find", dir)
		s.must("umount", dir)
		return strings.Count(found.stdout, dir)
	}
	if n, want := count(), len(im.Listing(t)); n != want {
		t.Errorf("%d of %d paths are seen", n, want)
	}
	if n := count("-o", "default_permissions"); n != 1 {
		t.Errorf("with default_permissions %d paths are seen", n)
	}
}
