package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// leaves are the commands that do something, each with the words that lead to it.
func leaves(commands []*cli.Command, above ...string) (all [][]string) {
	for _, c := range commands {
		path := append(slices.Clone(above), c.Name)
		if len(c.Subcommands) == 0 {
			all = append(all, path)
		}
		all = append(all, leaves(c.Subcommands, path...)...)
	}
	return all
}

// TestUsageErrorsNameTheCommand: what is wrong with a command line names the help of just that command, whatever the
// command is below.
func TestUsageErrorsNameTheCommand(t *testing.T) {
	paths := leaves((&program{}).app().Commands)
	if !slices.ContainsFunc(paths, func(path []string) bool { return slices.Equal(path, []string{"profile", "merge"}) }) {
		t.Fatalf("commands: %q", paths)
	}
	help := regexp.MustCompile(`; see (.*) --help\n$`)
	for _, path := range paths {
		name := strings.Join(path, " ")
		for _, args := range [][]string{{"--no-such-flag"}, {"x", "--json"}} {
			code, _, stderr := command(t, append(slices.Clone(path), args...)...)
			if code != exitUsage || strings.Count(stderr, "\n") != 1 {
				t.Errorf("%s %q: exit code %d, %q", name, args, code, stderr)
			}
			found := help.FindStringSubmatch(stderr)
			if found == nil && stderr == "erofs-oci: "+name+" takes no arguments\n" {
				continue
			}
			if found == nil || found[1] != "erofs-oci "+name {
				t.Errorf("%s %q: %q", name, args, stderr)
			}
		}
	}
}

func TestWrongNumberOfArguments(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"stat x", "stat takes REF and PATH, not 1 arguments; see erofs-oci stat --help"},
		{"ls", "ls takes REF [PATH], not 0 arguments; see erofs-oci ls --help"},
		{"ls a b c", "ls takes REF and one PATH, not 3 arguments; see erofs-oci ls --help"},
		{"profile diff a", "profile diff takes A and B, not 1 arguments; see erofs-oci profile diff --help"},
		{"helper install x", "helper install takes no arguments"},
	} {
		if code, _, stderr := command(t, strings.Fields(c.args)...); code != exitUsage || stderr != "erofs-oci: "+c.want+"\n" {
			t.Errorf("%s: exit code %d, %q", c.args, code, stderr)
		}
	}
}
