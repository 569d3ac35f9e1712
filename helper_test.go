package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestHelperArgs(t *testing.T) {
	mount := func(flags ...string) []string {
		return slices.Concat([]string{"erofs-oci", "mount"}, flags, []string{"h/r:v1", "/mnt"})
	}
	for _, c := range []struct {
		in   string // words, without the program's
		want []string
		err  string
	}{
		{in: "h/r:v1 /mnt", want: mount()},
		{in: "h/r:v1 /mnt -o rw", want: mount()},
		{in: "h/r:v1 /mnt -nv -t erofs-oci -o ro,nosuid,_netdev", want: mount("-o", "ro,nosuid,_netdev")},
		{in: "h/r:v1 /mnt -vorw,nodev", want: mount("-o", "nodev")},
		{in: "-o ro h/r:v1 -o nodev /mnt", want: mount("-o", "ro,nodev")},
		{in: "h/r:v1 /mnt -o rw,backend=auto,platform=linux/arm64,layer=1", want: mount("--backend=auto", "--platform=linux/arm64", "--layer=1")},
		{in: "h/r:v1 /mnt -o plain_http,authfile=/a=b,cache_dir=/c,on_error=wait:60s,noexec", want: mount("--plain-http", "--authfile=/a=b", "--cache-dir=/c", "--on-error=wait:60s", "-o", "noexec")},
		{in: "h/r:v1 /mnt -o cache_size=1GiB,cache-min-free=2G,paranoid", want: mount("--cache-size=1GiB", "--cache-min-free=2G", "--paranoid")},
		{in: "h/r:v1 /mnt -o max_conns_per_host=2", want: mount("--max-conns-per-host=2")},
		{in: "h/r:v1 /mnt -o tls_ca=/ca.pem,tls_verify=false", want: mount("--tls-ca=/ca.pem", "--tls-verify=false")},
		{in: "h/r:v1 /mnt -o plain-http,cache-dir=/c", want: mount("--plain-http", "--cache-dir=/c")},
		{in: "h/r:v1 /mnt -o log_format=json,log_level=info", want: mount("--log-format=json", "--log-level=info")},
		{in: "h/r:v1 /mnt -o log_level", err: "log_level needs a value"},
		{in: "h/r:v1 /mnt -o verify=require", want: mount("--verify=require")},
		{in: "h/r:v1 /mnt -o blob=sha256:00,nbd_connections=4,supervise", want: mount("--blob=sha256:00", "--nbd-connections=4", "--supervise")},
		{in: `h/r:v1 /mnt -o overlay="/a,b",tmpfs_overlay`, want: mount("--overlay=/a,b", "--tmpfs-overlay")},
		{in: "h/r:v1 /mnt -o nosuch=1,x-systemd.automount", want: mount("-o", "nosuch=1,x-systemd.automount")},
		{in: "h/r:v1 /mnt -s -o nosuch=1,nosuid", want: mount("-o", "nosuid")},
		// Nothing is done, but what is wrong is said.
		{in: "h/r:v1 /mnt -f -o ro", want: nil},
		{in: "h/r:v1 /mnt -f -o password=hush", err: "a password is not taken here"},

		{in: "", err: "usage: mount.erofs-oci REF DIR"},
		{in: "h/r:v1", err: "usage: mount.erofs-oci REF DIR"},
		{in: "h/r:v1 /mnt /mnt", err: "usage: mount.erofs-oci REF DIR"},
		{in: "h/r:v1 /mnt -x", err: "option -x is not known"},
		{in: "h/r:v1 /mnt --help", err: "option -- is not known"},
		{in: "h/r:v1 /mnt -o", err: "option -o needs a value"},
		{in: "h/r:v1 /mnt -N /proc/1/ns/mnt", err: "nsenter --mount=/proc/1/ns/mnt"},
		{in: `h/r:v1 /mnt -o overlay="/a`, err: "quotation mark"},
		{in: "h/r:v1 /mnt -o username=alice,password=hush", err: "nobody can be asked for the password"},
		{in: "h/r:v1 /mnt -o password=hush", err: "a password is not taken here"},
		{in: "h/r:v1 /mnt -o password_stdin", err: "nobody can be asked"},
		{in: "h/r:v1 /mnt -o backend", err: "backend needs a value, as backend=VALUE"},
		{in: "h/r:v1 /mnt -o cache_dir=", err: "cache_dir needs a value"},
		{in: "h/r:v1 /mnt -o verify=", err: "verify needs a value"},
		{in: "h/r:v1 /mnt -o plain_http=yes", err: "plain_http takes no value"},
	} {
		got, err := helperArgs(append([]string{"/sbin/mount.erofs-oci"}, strings.Fields(c.in)...))
		if c.err == "" {
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("%q: %q, %v; want %q", c.in, got, err, c.want)
			}
			continue
		}
		var usage errUsage
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), c.err) || strings.Contains(err.Error(), "hush") || got != nil {
			t.Errorf("%q: %q, %v; want an error with %q", c.in, got, err, c.err)
		}
	}
}

func TestCalledAsHelper(t *testing.T) {
	for name, want := range map[string]bool{
		"mount.erofs-oci": true, "/sbin/mount.erofs-oci": true, "./mount.erofs-oci": true,
		"erofs-oci": false, "/usr/bin/erofs-oci": false, "mount.erofs": false, "mount.erofs-oci-x": false,
	} {
		if got := calledAsHelper([]string{name}); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if calledAsHelper(nil) {
		t.Error("called by nothing")
	}
}

func TestHelperExit(t *testing.T) {
	for ours, want := range map[int]int{0: 0, exitUsage: 1, exitFailure: 32, 137: 32} {
		if got := helperExit(ours); got != want {
			t.Errorf("%d: %d, want %d", ours, got, want)
		}
	}
}

// TestInstallHelper installs, replaces and removes links of ours, and nothing
// else.
func TestInstallHelper(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const file = "a file"
	for _, c := range []struct {
		name, before    string // where the link leads, file, or "" for nothing
		install, remove bool   // succeed
		left            bool   // after remove
	}{
		{name: "nothing", install: true, remove: true},
		{name: "ours", before: program, install: true, remove: true},
		{name: "ours elsewhere", before: "/nonexistent/" + filepath.Base(program), install: true, remove: true},
		{name: "another program", before: "/bin/true", left: true},
		{name: "a file", before: file, left: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, do := range []string{"install", "remove"} {
				dir := t.TempDir()
				link := filepath.Join(dir, "mount.erofs-oci")
				put(t, link, c.before, file)
				before, _ := os.Readlink(link)
				run, want := installHelper, c.install
				if do == "remove" {
					run, want = removeHelper, c.remove
				}
				said, err := run(dir)
				if (err == nil) != want || (said != "") != want {
					t.Errorf("%s: %q, %v", do, said, err)
				}
				after, readErr := os.Readlink(link)
				switch {
				case do == "install" && want && after != program:
					t.Errorf("installed a link to %q, %v", after, readErr)
				case !want && after != before:
					t.Errorf("%s was refused and changed %q to %q", do, before, after)
				case do == "remove" && !c.left && !errors.Is(readErr, os.ErrNotExist):
					t.Errorf("removed, but there: %q, %v", after, readErr)
				}
				if left, err := os.ReadDir(dir); err != nil || len(left) > 1 {
					t.Errorf("%s left %v, %v", do, left, err)
				}
			}
		})
	}
}

func put(t *testing.T, link, to, file string) {
	t.Helper()
	var err error
	switch to {
	case "":
	case file:
		err = os.WriteFile(link, nil, 0o755)
	default:
		err = os.Symlink(to, link)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestHelperHelp: the help names each option that becomes a flag, once; and each becomes a flag that mount has.
func TestHelperHelp(t *testing.T) {
	p := &program{}
	words := strings.FieldsFunc(p.helperCommand().Description, func(r rune) bool { return strings.ContainsRune(" ,.:\n", r) })
	flags := make(map[string]bool)
	for _, f := range p.mountCommand().Flags {
		for _, name := range f.Names() {
			flags[name] = true
		}
	}
	listed := strings.Split(strings.Join(strings.Fields(helperOptions()), ""), ",")
	for key := range helperKeys() {
		word := strings.ReplaceAll(key, "-", "_")
		if n := len(slices.DeleteFunc(slices.Clone(listed), func(l string) bool { return l != word })); n != 1 {
			t.Errorf("%s is listed %d times", word, n)
		}
		if !slices.Contains(words, word) {
			t.Errorf("%s is not in the help", word)
		}
		if !flags[key] {
			t.Errorf("mount has no flag --%s", key)
		}
	}
	if len(listed) != len(helperKeys()) {
		t.Errorf("%d are listed of %d", len(listed), len(helperKeys()))
	}
}
