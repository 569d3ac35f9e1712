package registry

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A platform is os/arch/variant in normal form: lower case, one spelling for
// each architecture, and no variant where it is the architecture's default
// (amd64/v1, arm64/v8), except for arm, whose default is v7.
type platform struct{ os, arch, variant string }

func (p platform) String() string {
	s := p.os + "/" + p.arch
	if p.variant != "" {
		s += "/" + p.variant
	}
	return s
}

// parsePlatform reads os/arch[/variant]; the empty string is the host's.
func parsePlatform(s string) (platform, error) {
	if s == "" {
		return hostPlatform(), nil
	}
	f := strings.Split(s, "/")
	if len(f) < 2 || len(f) > 3 || slices.Contains(f, "") {
		return platform{}, fmt.Errorf("platform %q: want OS/ARCH or OS/ARCH/VARIANT, as linux/amd64 or linux/arm/v7", clean(s, 100))
	}
	p := platform{os: f[0], arch: f[1]}
	if len(f) == 3 {
		p.variant = f[2]
	}
	return p.normal(), nil
}

func hostPlatform() platform {
	p := platform{os: runtime.GOOS, arch: runtime.GOARCH}
	if p.arch == "arm" {
		if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
			p.variant = armVariant(string(b))
		}
	}
	return p.normal()
}

// armVariant reads the variant out of /proc/cpuinfo; "" where it does not say.
func armVariant(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		key, value, _ := strings.Cut(line, ":")
		if !strings.EqualFold(strings.TrimSpace(key), "CPU architecture") {
			continue
		}
		value = strings.ToLower(strings.TrimSpace(value))
		switch {
		case value == "aarch64":
			return "v8"
		case value != "" && value[0] >= '5' && value[0] <= '8':
			return "v" + value[:1]
		}
		return ""
	}
	return ""
}

func platformOf(p *ocispec.Platform) platform {
	return platform{os: p.OS, arch: p.Architecture, variant: p.Variant}.normal()
}

func (p platform) normal() platform {
	p.os, p.arch, p.variant = strings.ToLower(p.os), strings.ToLower(p.arch), strings.ToLower(p.variant)
	if p.os == "macos" {
		p.os = "darwin"
	}
	if p.variant != "" && p.variant[0] >= '0' && p.variant[0] <= '9' {
		p.variant = "v" + p.variant
	}
	switch p.arch {
	case "i386":
		p.arch, p.variant = "386", ""
	case "x86_64", "x86-64":
		p.arch = "amd64"
	case "aarch64":
		p.arch = "arm64"
	case "armhf":
		p.arch, p.variant = "arm", "v7"
	case "armel":
		p.arch, p.variant = "arm", "v6"
	}
	switch {
	case p.arch == "amd64" && p.variant == "v1", p.arch == "arm64" && p.variant == "v8":
		p.variant = ""
	case p.arch == "arm" && p.variant == "":
		p.variant = "v7"
	}
	return p
}

// accepts lists what may run on p, best first, as containerd's platforms.Only
// does: lower variants of the same architecture, then the 32-bit architecture
// that a 64-bit processor carries along. p is in normal form.
func (p platform) accepts() []platform {
	list := []platform{p}
	add := func(arch, variant string) {
		list = append(list, platform{p.os, arch, variant}.normal())
	}
	major, minor := p.version()
	switch p.arch {
	case "amd64":
		for v := major - 1; v >= 1; v-- {
			add("amd64", "v"+strconv.Itoa(v))
		}
		add("386", "")
	case "arm":
		for v := major - 1; v >= 5; v-- {
			add("arm", "v"+strconv.Itoa(v))
		}
	case "arm64":
		// ARM v9.x contains v8.(x+5).
		if major == 9 {
			for m := minor - 1; m >= 0; m-- {
				add("arm64", armVersion(9, m))
			}
			minor += 6
		}
		for m := minor - 1; m >= 0 && major <= 9; m-- {
			add("arm64", armVersion(8, m))
		}
		for v := 8; v >= 5; v-- {
			add("arm", "v"+strconv.Itoa(v))
		}
	}
	return list
}

func armVersion(major, minor int) string {
	s := "v" + strconv.Itoa(major)
	if minor > 0 {
		s += "." + strconv.Itoa(minor)
	}
	return s
}

// version reads "v8" or "v8.2"; an unreadable variant is 0, 0, which accepts
// only itself. Two digits are more than any variant has.
func (p platform) version() (major, minor int) {
	v := p.variant
	if p.arch == "arm64" && v == "" {
		v = "v8"
	}
	if len(v) > len("v99.99") {
		return 0, 0
	}
	a, b, _ := strings.Cut(strings.TrimPrefix(v, "v"), ".")
	major, err := strconv.Atoi(a)
	if err != nil || major < 0 {
		return 0, 0
	}
	if minor, err = strconv.Atoi(b); err != nil || minor < 0 {
		minor = 0
	}
	return major, minor
}

// choose returns the index entry to use for want, or -1.
//
// The architecture that was asked for comes before one that is only compatible;
// then an entry that says it holds EROFS before one that does not; then the
// nearest variant; then the order of the index. An index that names no platform
// for exactly one entry means that entry for everybody.
func choose(entries []ocispec.Descriptor, want platform) int {
	accepted := want.accepts()
	best, bestRank := -1, [3]int{}
	unnamed, unnamedCount := -1, 0
	for i, e := range entries {
		if e.Platform == nil {
			unnamed, unnamedCount = i, unnamedCount+1
			continue
		}
		p := platformOf(e.Platform)
		near := slices.Index(accepted, p)
		if near < 0 {
			continue
		}
		rank := [3]int{1, 1, near}
		if p.arch == want.arch {
			rank[0] = 0
		}
		if slices.Contains(e.Platform.OSFeatures, FeatureErofs) {
			rank[1] = 0
		}
		if best < 0 || slices.Compare(rank[:], bestRank[:]) < 0 {
			best, bestRank = i, rank
		}
	}
	if best < 0 && unnamedCount == 1 {
		return unnamed
	}
	return best
}
