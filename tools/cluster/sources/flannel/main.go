// Command flannel is flannel's daemon for servers of one cluster: it keeps the routes to the pods of the other servers, as the cluster's
// Node objects name them. Of upstream's backends it has the two that are needed here, of its traffic rules none (tools/cluster/network.py).
package main

import (
	"context"
	"flag"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw"
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan"
	"github.com/flannel-io/flannel/pkg/ipmatch"
	"github.com/flannel-io/flannel/pkg/subnet/kube"
	log "k8s.io/klog/v2"
)

func main() {
	address := flag.String("address", "", "this server's address in the cluster's network")
	network := flag.String("network", "/etc/kube-flannel/net-conf.json", "flannel's network configuration")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, *address, *network); err != nil && ctx.Err() == nil {
		log.Fatal(err)
	}
}

// run ends with the context. The server's name is in NODE_NAME; its range of pod addresses comes from its Node object.
func run(ctx context.Context, address, network string) error {
	manager, err := kube.NewSubnetManager(ctx, "", "", "flannel.alpha.coreos.com", network, true)
	if err != nil {
		return err
	}
	config, err := manager.GetNetworkConfig(ctx)
	if err != nil {
		return err
	}
	family, err := ipmatch.GetIPFamily(config.EnableIPv4, config.EnableIPv6)
	if err != nil {
		return err
	}
	link, err := ipmatch.LookupExtIface(address, "", "", family, ipmatch.PublicIPOpts{})
	if err != nil {
		return err
	}
	chosen, err := backend.NewManager(ctx, manager, link).GetBackend(config.BackendType)
	if err != nil {
		return err
	}
	var group sync.WaitGroup
	routes, err := chosen.RegisterNetwork(ctx, &group, config)
	if err != nil {
		return err
	}
	log.Infof("%s: pods of this server in %s", config.BackendType, routes.Lease().Subnet)
	group.Go(func() { routes.Run(ctx) })
	err = manager.CompleteLease(ctx, routes.Lease(), &group)
	group.Wait()
	return err
}
