package backend

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseMountOptions(t *testing.T) {
	for _, c := range []struct {
		in    string
		flags uintptr
		other bool
		err   string
	}{
		{in: ""},
		{in: "ro,defaults,_netdev,x-systemd.automount,nofail"},
		{in: "ro,nosuid,nodev,allow_other", flags: unix.MS_NOSUID | unix.MS_NODEV, other: true},
		{in: "nosuid,suid,noexec", flags: unix.MS_NOEXEC},
		{in: "suid,nosuid", flags: unix.MS_NOSUID},
		{in: "noatime,nodiratime,nosymfollow", flags: unix.MS_NOATIME | unix.MS_NODIRATIME | 0x100},
		{in: "nosuid,rw", err: "read-only"},
		{in: "remount,ro", err: "unmount it"},
		{in: "nosuid,nosuch=1", err: `"nosuch=1" is not known`},
	} {
		got, err := ParseMountOptions([]string{c.in})
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v, want one with %q", c.in, err, c.err)
			}
			continue
		}
		if err != nil || got.Flags != c.flags || got.AllowOther != c.other {
			t.Errorf("%q: %+v, %v; want flags %#x, allow_other %v", c.in, got, err, c.flags, c.other)
		}
	}
}
